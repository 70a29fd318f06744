"""Whether models have their base's tensors: one error that lists everything which differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_peft.merging.streaming import DTYPES, SafetensorsFolder

LISTED = 20
TIED = 4  # of more tensors that are in one folder only, it is not looked for the ones they might be tied to


def check_same_tensors(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], keep_base_vocabulary: bool = False
) -> set[str]:
    """Compares names and shapes; what is stored twice in one folder and once in the other (a tied head) is the same.

    Args:
        base: The base.
        models: The models.
        keep_base_vocabulary: Where a model's vocabulary has another size, take the base's tensor.

    Returns:
        The names that are to be taken from the base.

    Raises:
        ValueError: Anything else differs; the message lists what.
    """
    problems, kept = [], set()
    narrow = [name for name, tensor in _floating(base) if tensor not in DTYPES]
    problems += _listed(f"{_label(base, 'the base')} holds codes of fewer than 16 bits", narrow)
    rows = _vocabulary(base)
    for k, model in enumerate(models):
        label = _label(model, f"model {k}")
        missing = [name for name in base if name not in model]
        extra = [name for name in model if name not in base]
        if len(missing) + len(extra) <= TIED:
            missing = [name for name in missing if not _same_in_base(base, model, name)]
            extra = [name for name in extra if not _twin(model, name, base)]
        problems += _listed(f"{label} lacks", missing) + _listed(f"{label} has what the base has not:", extra)
        for name in base:
            if name not in model:
                continue
            ours, theirs = _shape(base, name), _shape(model, name)
            resized = len(ours) == len(theirs) > 0 and ours[1:] == theirs[1:] and rows in (None, ours[0])
            if ours != theirs and resized and keep_base_vocabulary:
                kept.add(name)
            elif ours != theirs:
                hint = " (a resized vocabulary? keep_base_vocabulary=True takes the base's)" if resized else ""
                problems.append(f"{label}: {name} has shape {theirs} and in the base {ours}{hint}")
    if problems:
        raise ValueError("the models do not have the base's tensors:\n  " + "\n  ".join(problems))
    return kept


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{what} {', '.join(names[:LISTED])}{more}"]


def _label(tensors: Mapping[str, Tensor], otherwise: str) -> str:
    return str(tensors.folder) if isinstance(tensors, SafetensorsFolder) else otherwise


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tensors.shapes[name] if isinstance(tensors, SafetensorsFolder) else tuple(tensors[name].shape)


def _floating(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype]]:
    folder = isinstance(tensors, SafetensorsFolder)
    dtypes = [(name, tensors.dtype(name) if folder else tensors[name].dtype) for name in tensors]  # type: ignore[attr-defined]
    return [(name, dtype) for name, dtype in dtypes if dtype.is_floating_point]


def _vocabulary(base: Mapping[str, Tensor]) -> int | None:
    config = base.config if isinstance(base, SafetensorsFolder) else {}
    return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")


def _twin(tensors: Mapping[str, Tensor], name: str, among: Mapping[str, Tensor]) -> str | None:
    """Another name, also in `among`, under which `tensors` holds the same matrix: a tied one that was stored twice."""
    tensor = tensors[name]
    if tensor.ndim < 2 or not bool(tensor.any()):
        return None
    for other in tensors:
        same_shape = other != name and other in among and _shape(tensors, other) == tuple(tensor.shape)
        if same_shape and torch.equal(tensors[other], tensor):
            return other
    return None


def _same_in_base(base: Mapping[str, Tensor], model: Mapping[str, Tensor], name: str) -> bool:
    twin = _twin(base, name, model)
    if twin is not None and isinstance(model, SafetensorsFolder):
        model.aliases[name] = twin
        model.shapes[name] = model.shapes[twin]
        return True
    return False
