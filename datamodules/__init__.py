"""Data modules: what the step is fed, one technique a file. Names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "InstructionData": "instruction_data",
    "LookAheadDataLoader": "look_ahead",
    "ResumableSampler": "resumable_sampler",
    "SelfDistillationData": "self_distillation",
    "StandardLibraryCode": "standard_library_code",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
