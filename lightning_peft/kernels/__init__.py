"""Kernels: losses over a vocabulary that never hold the logits, each behind one function."""

# Not lazy: the module and its function share a name, and the name must stay the function's.
from lightning_peft.kernels.linear_cross_entropy import (
    CrossEntropyOutput,
    Rows,
    WeightedOutput,
    linear_cross_entropy,
    weighted_linear_cross_entropy,
)
from lightning_peft.kernels.linear_kl import linear_kl

__all__ = [
    "CrossEntropyOutput",
    "Rows",
    "WeightedOutput",
    "linear_cross_entropy",
    "linear_kl",
    "weighted_linear_cross_entropy",
]
