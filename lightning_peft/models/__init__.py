"""Ready LightningModules for any transformers network."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "CausalLM": "causal_lm",
    "FineTuningModule": "fine_tuning_module",
    "ImageClassifier": "image_classifier",
    "SequenceClassifier": "sequence_classifier",
    "TextEncoder": "text_encoder",
    "load_pretrained": "pretrained",
    "load_tokenizer": "pretrained",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
