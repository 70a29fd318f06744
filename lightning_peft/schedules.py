"""Coefficients over training: plain functions of the optimizer step s out of S."""

from __future__ import annotations

import math

NAMES = ("constant", "linear", "sine", "rsine", "sine_R")


def check_schedule(name: str, argument: str = "schedule") -> None:
    """Raises `ValueError` for a name that `coefficient` does not know."""
    if name in ("constant", "linear", "sine", "rsine"):
        return
    kind, _, ratio = name.partition("_")
    try:
        known = kind == "sine" and 0 < float(ratio) <= 1
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{argument}={name!r} is not known: use one of {NAMES}, with R a fraction such as 'sine_0.3' in (0, 1]."
        )


def coefficient(name: str, step: int, total: int) -> float:
    """The coefficient at optimizer step `step` (0-based) of `total`, in [0, 1].

    constant 1; linear s/S; sine sin(s/S pi/2); rsine ("reflected sine") sin((S - s)/S pi/2), from 1 down to 0; sine_R a
    sine that is 1 from the fraction R of training on (CAFT, arXiv 2506.07833, `caft/core.py`).

    Raises:
        ValueError: Unknown name.
    """
    check_schedule(name)
    if name == "constant":
        return 1.0
    done = min(step / total, 1.0)
    if name == "linear":
        return done
    if name == "sine":
        return math.sin(done * math.pi / 2)
    if name == "rsine":
        return math.sin((1.0 - done) * math.pi / 2)
    return math.sin(min(done / float(name.partition("_")[2]), 1.0) * math.pi / 2)
