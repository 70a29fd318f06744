"""Functions from checkpoints to a checkpoint, one technique a file."""

from __future__ import annotations

# Not lazily: `model_stock` is a module and a function; whoever imports the module first must still find the function.
from lightning_peft.merging.folders import METHODS, merge
from lightning_peft.merging.half_reset import half_reset
from lightning_peft.merging.model_stock import interpolation_ratio, model_stock, model_stock_tensor
from lightning_peft.merging.streaming import SafetensorsFolder, write_folder

__all__ = [
    "METHODS",
    "SafetensorsFolder",
    "half_reset",
    "interpolation_ratio",
    "merge",
    "model_stock",
    "model_stock_tensor",
    "write_folder",
]
