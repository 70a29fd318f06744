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
    "DistributionRegularized": "distribution_regularized",
    "DistributionRegularizedImageClassifier": "distribution_regularized",
    "DistributionRegularizedMixin": "distribution_regularized",
    "DynamicFineTuning": "dynamic_fine_tuning",
    "DynamicFineTuningCausalLM": "dynamic_fine_tuning",
    "DynamicFineTuningMixin": "dynamic_fine_tuning",
    "EditMean": "edit_mean",
    "FaultAware": "fault_aware",
    "FaultAwareCausalLM": "fault_aware",
    "FaultAwareMixin": "fault_aware",
    "HeadTerm": "objective",
    "MetaTokenWeighting": "meta_weighting",
    "MetaTokenWeightingCausalLM": "meta_weighting",
    "MetaTokenWeightingMixin": "meta_weighting",
    "Objective": "objective",
    "ReasoningHighlighted": "reasoning_highlighted",
    "ReasoningHighlightedCausalLM": "reasoning_highlighted",
    "ReasoningHighlightedMixin": "reasoning_highlighted",
    "OnlineAdaptation": "online_adaptation",
    "OnlineAdaptationCausalLM": "online_adaptation",
    "OnlineAdaptationMixin": "online_adaptation",
    "SelectiveMixup": "selective_mixup",
    "SetSupervised": "set_supervised",
    "SetSupervisedCausalLM": "set_supervised",
    "SetSupervisedMixin": "set_supervised",
    "SelectiveMixupImageClassifier": "selective_mixup",
    "SelectiveMixupMixin": "selective_mixup",
    "SelfConstrained": "self_constrained",
    "SelfConstrainedCausalLM": "self_constrained",
    "SelfConstrainedMixin": "self_constrained",
    "TrunkState": "objective",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
