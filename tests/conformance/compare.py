"""Comparisons that say where two runs part."""

from __future__ import annotations

import math

from torch import Tensor


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite for other shapes or if a value is not finite."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    largest = (a.double() - b.double()).abs().max().item()
    return largest if math.isfinite(largest) else math.inf


def assert_same(made: dict[str, Tensor], expected: dict[str, Tensor], atol: float, what: str) -> None:
    """The same names, and every value within `atol` (0 asks for the same bits)."""
    missing, further = sorted(expected.keys() - made.keys()), sorted(made.keys() - expected.keys())
    assert not missing, f"{what}: {len(missing)} tensors are missing, first {missing[0]}"
    assert not further, f"{what}: {len(further)} tensors are new, first {further[0]}"
    apart = {name: difference(made[name], value) for name, value in expected.items()}
    far = [name for name, distance in apart.items() if distance > atol]
    assert not far, (
        f"{what}: {len(far)} of {len(expected)} tensors differ by more than {atol}; first {far[0]} by "
        f"{apart[far[0]]:.3g}, most {max(apart, key=lambda name: apart[name])} by {max(apart.values()):.3g}"
    )


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that changed."""
    return {name for name, value in before.items() if name in after and difference(value, after[name]) > 0}
