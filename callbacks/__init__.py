"""Callbacks: what happens around a step, one technique a file. Names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "AuxiliaryHeadCheckpoint": "concept_aware",
    "AuxiliaryHeadSchedule": "concept_aware",
    "BitFit": "bitfit",
    "ConceptAblation": "concept_ablation",
    "DSEE": "dsee",
    "DeltaCheckpoint": "delta_checkpoint",
    "EditEvaluation": "edit_evaluation",
    "ExpertSpecialized": "expert_specialized",
    "HalfFineTuning": "half_finetuning",
    "IntrinsicDimension": "intrinsic_dimension",
    "KaSA": "kasa",
    "LayerFreezing": "layer_freezing",
    "LoKI": "loki",
    "LocalizedEditing": "localized_editing",
    "LossCurves": "loss_curves",
    "ModelStock": "model_stock",
    "PEFT": "peft",
    "ParallelTagGeneration": "parallel_tag_generation",
    "PositionLoss": "position_loss",
    "QuestionAnswering": "question_answering",
    "RandomState": "random_state",
    "SelectiveLoRA": "selective_lora",
    "SliceFine": "slice_fine",
    "TokenWeightViewer": "token_weight_viewer",
    "TransPEFT": "trans_peft",
    "WeightSelection": "weight_selection",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
