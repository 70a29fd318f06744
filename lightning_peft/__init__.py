"""Fine-tuning papers as PyTorch Lightning callbacks, mixins and data modules.

Importing this package imports nothing but the standard library: names are resolved on first use (PEP 562), so that
`lightning-peft --help` and tools that only look at the registry stay quick.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout `callbacks/` and `datamodules/` stand beside this folder (an editable install or a wheel maps them in).
# From the root of a checkout this folder shadows an installed copy, so its siblings are made importable here.
_root = Path(__file__).resolve().parent.parent
if (_root / "callbacks" / "__init__.py").is_file() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

importlib.import_module("lightning_peft.adapters")  # plain `peft` then loads what we save; no import of peft here

_lazy = {
    "CausalLM": "lightning_peft.models",
    "FineTuningModule": "lightning_peft.models",
    "SequenceClassifier": "lightning_peft.models",
    "TextEncoder": "lightning_peft.models",
    "Objective": "lightning_peft.objectives",
}


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(_lazy[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
