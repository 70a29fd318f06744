"""Data modules: what the step is fed, one technique a file. Names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "ClassPairSampler": "class_pair_sampler",
    "ClassPairs": "class_pair_sampler",
    "DocumentQuestionData": "document_questions",
    "ImageData": "image_data",
    "TraceSetCollator": "trace_set",
    "TraceSetData": "trace_set",
    "ChainVersionTransform": "long_short_mixture",
    "ContextualData": "contextual",
    "ContextualPromptTransform": "contextual",
    "EditData": "edits",
    "FaultPairs": "fault_pairs",
    "InstructionData": "instruction_data",
    "LearningNodeDistillation": "learning_nodes",
    "LongShortMixtureData": "long_short_mixture",
    "LookAheadDataLoader": "look_ahead",
    "LookAheadTransform": "look_ahead_tuning",
    "LookAheadTuningData": "look_ahead_tuning",
    "QuestionFreeData": "question_free",
    "QuestionFreeTransform": "question_free",
    "ReferenceData": "reference_data",
    "RefusalAwareData": "refusal_aware",
    "RefusalAwareTransform": "refusal_aware",
    "ResumableSampler": "resumable_sampler",
    "SelfDistillationData": "self_distillation",
    "ShuffleDiscriminatedData": "shuffle_discriminator",
    "StandardLibraryCode": "standard_library_code",
    "StandardLibraryFaultPairs": "fault_pairs",
    "StandardLibraryPairs": "text_pairs",
    "SymbolTuningData": "symbol_tuning",
    "SymbolTuningTransform": "symbol_tuning",
    "SymbolVocabulary": "symbol_tuning",
    "TextPairData": "text_pairs",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
