"""Objectives: what the loss is, one technique a file."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "AuxiliaryHeadPretraining": "concept_aware",
    "AuxiliaryHeadPretrainingCausalLM": "concept_aware",
    "AuxiliaryHeadPretrainingMixin": "concept_aware",
    "AuxiliaryHeads": "auxiliary_heads",
    "ConceptAwareCausalLM": "concept_aware",
    "ConceptAwareFineTuning": "concept_aware",
    "ConceptAwareFineTuningMixin": "concept_aware",
    "HeadTerm": "objective",
    "Objective": "objective",
    "TrunkState": "objective",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
