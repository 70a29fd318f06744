"""Callbacks: what happens around a step, one technique a file. Names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "AuxiliaryHeadCheckpoint": "concept_aware",
    "AuxiliaryHeadSchedule": "concept_aware",
    "HalfFineTuning": "half_finetuning",
    "LossCurves": "loss_curves",
    "PEFT": "peft",
    "PositionLoss": "position_loss",
    "RandomState": "random_state",
    "WeightSelection": "weight_selection",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
