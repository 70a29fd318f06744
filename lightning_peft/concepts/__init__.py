"""Concepts in a network's activations. Names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

_lazy = {
    "activation_difference_pca": "directions",
    "attribution_rank": "directions",
    "chosen_directions": "directions",
    "load_directions": "directions",
    "sae_decoder_directions": "directions",
    "save_directions": "directions",
    "write_report": "directions",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
