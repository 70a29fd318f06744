"""`lightning-peft merge`: fine-tuned models of one base into one, tensor by tensor from disk to disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.merging.model_stock import check_options, model_stock_tensor
from lightning_peft.merging.same_tensors import check_same_tensors
from lightning_peft.merging.streaming import SafetensorsFolder, refuse_other_content, write_folder

#: Name -> function (base tensor, models' tensors, **options, dtype) -> tensor; a further method is a further row.
METHODS: dict[str, Callable[..., Tensor]] = {"model_stock": model_stock_tensor}
OUTPUT_DTYPES = ("float32", "bfloat16", "float16", "float64")


def merge(
    base: str,
    models: list[str],
    out: str,
    method: str = "model_stock",
    options: dict[str, Any] | None = None,
    dtype: str | None = None,
    keep_base_vocabulary: bool = False,
    shard_gigabytes: float = 5.0,
    **method_options: Any,
) -> str:
    """Merges models that were fine-tuned from one base, holding one tensor of the result at a time.

    Config, tokenizer and integer buffers are the base's. A run that is killed leaves `out` as it was.

    Args:
        base: Folder of the base model, with safetensors.
        models: Folders of the fine-tuned models.
        out: Folder to write. A model that is there is replaced when the new one is whole.
        method: Name of the method: "model_stock".
        options: The method's options; "model_stock" takes filter_wise, pairwise, clamp and compat.
        dtype: "float32", "bfloat16", "float16" or "float64"; by default each tensor's in the base.
        keep_base_vocabulary: Take the base's tensor where a model's vocabulary has been resized.
        shard_gigabytes: Size of a shard of the result at most.
        **method_options: The method's options as keywords.

    Returns:
        The folder written.

    Raises:
        ValueError: Unknown method or option, fewer than two models, models with other tensors (the message lists them),
            or `out` is in use.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known: use one of {sorted(METHODS)}.")
    function, given = METHODS[method], {**(options or {}), **method_options}
    known = [name for name in list(inspect.signature(function).parameters)[2:] if name != "dtype"]
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"{method} has no options {unknown}: it takes {known}.")
    if dtype not in (None, *OUTPUT_DTYPES):
        raise ValueError(f"dtype={dtype!r} is not known: use one of {OUTPUT_DTYPES}, or None for the base's.")
    if shard_gigabytes <= 0:
        raise ValueError(f"shard_gigabytes={shard_gigabytes} must be positive.")
    if function is model_stock_tensor:
        check_options(len(models), given.get("pairwise", "cos"), given.get("compat"))
    if any(Path(out).resolve() == Path(folder).resolve() for folder in (base, *models)):
        raise ValueError(f"out={out!r} is one of the models that are read: give another folder.")
    refuse_other_content(Path(out).absolute())
    theta0, thetas = SafetensorsFolder(base), [SafetensorsFolder(model) for model in models]
    kept = check_same_tensors(theta0, thetas, keep_base_vocabulary)
    asked: torch.dtype | None = getattr(torch, dtype) if dtype else None
    layout = {}
    for name in theta0:
        stored = theta0.dtype(name)
        layout[name] = (theta0.shapes[name], asked if asked and stored.is_floating_point else stored)

    def merged() -> Iterator[Tensor]:
        for name, (_, target) in layout.items():  # the base's order: each of its files is read once
            tensor = theta0[name]
            if not target.is_floating_point or name in kept:
                yield tensor.to(target)
            else:
                yield function(tensor, [theta[name] for theta in thetas], **given, dtype=target)

    write_folder(merged(), layout, out, base, int(shard_gigabytes * 2**30))
    return out
