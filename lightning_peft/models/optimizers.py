"""Optimizers and schedules by name, with transformers' usual defaults."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.Adafactor",
    "sgd": "torch.optim.SGD",
}


def imported(path: str, argument: str) -> Any:
    """What a class path names; raises `ValueError`, naming the argument it was given for, if nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        names = f" or one of {sorted(OPTIMIZERS)}" if argument == "optimizer" else ""
        raise ValueError(
            f"{argument}={path!r} cannot be imported ({error}): give a class path such as 'torch.optim.AdamW'{names}."
        ) from error


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains: matrices with `weight_decay`, biases and norms (one-dimensional) without.

    Raises:
        ValueError: Nothing requires a gradient.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"no parameter of {type(module).__name__} requires a gradient, so nothing would train: check the "
            "callbacks and arguments that freeze."
        )
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_scheduler(name: str, optimizer: Any, warmup_steps: float, steps: float, arguments: dict[str, Any]) -> Any:
    """A scheduler by `transformers.get_scheduler`'s names or by class path, stepped once an optimizer step.

    Args:
        name: "cosine", "linear", "constant_with_warmup", ..., or a class path (`torch.optim.lr_scheduler.StepLR`).
        optimizer: The optimizer.
        warmup_steps: Steps of linear warm-up; below 1 a fraction of `steps`.
        steps: Optimizer steps in all; infinite if unknown.
        arguments: Further arguments of the scheduler.

    Raises:
        ValueError: The schedule needs the number of steps and it is not known.
    """
    if "." in name:
        return imported(name, "lr_scheduler")(optimizer, **arguments)
    from transformers import get_scheduler

    if steps == float("inf"):
        if not name.startswith("constant") or 0 < warmup_steps < 1:
            raise ValueError(
                f"lr_scheduler={name!r} with warmup_steps={warmup_steps} needs the number of steps, which is not "
                "known: set Trainer(max_steps=...) or use 'constant' or 'constant_with_warmup'."
            )
        steps = 0
    warmup = round(warmup_steps * steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    return get_scheduler(name, optimizer, warmup, int(steps), arguments or None)
