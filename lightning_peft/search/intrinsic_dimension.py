"""d90: in how few numbers does a task fit? (arXiv 2012.13255, paper 114)"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class IntrinsicDimensionResult:
    """What a search found.

    Args:
        d: The smallest d that was tried and reached `wanted`.
        wanted: The metric to reach.
        curve: Every d that was tried, in ascending order, with its metric.
    """

    d: int
    wanted: float
    curve: tuple[tuple[int, float], ...]

    def draw(self, path: str | Path) -> Path:
        """Writes the metric against d as a PNG."""
        from lightning_peft.pictures import new_figure

        figure, axes = new_figure()
        axes.plot(*zip(*self.curve), "o-")
        axes.axhline(self.wanted, linestyle="--", color="grey", label="wanted")
        axes.axvline(self.d, linestyle=":", color="grey")
        axes.set(xscale="log", xlabel="d", ylabel="metric", title=f"intrinsic dimension {self.d}")
        axes.legend()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return path


def d90(
    fit: Callable[[int], float],
    full: float,
    low: int = 10,
    high: int = 100_000,
    share: float = 0.9,
    tolerance: float = 1.2,
) -> IntrinsicDimensionResult:
    """The smallest d at which training in d numbers reaches a share of what training all weights does.

    By bisection on a logarithmic scale, taking the metric to grow with d: about log2(log(high / low) / log(tolerance))
    runs. Each may be a `Trainer.fit` with `callbacks.IntrinsicDimension(d)`.

    Args:
        fit: Trains in d numbers and gives the metric, the larger the better.
        full: The metric of full fine-tuning.
        low: The smallest d that may be tried.
        high: The largest.
        share: Of the full metric that is wanted; 0.9 for d90.
        tolerance: The result is at most this factor above a d that does not reach it.

    Raises:
        ValueError: An argument is out of range, a metric is not finite, or `high` does not reach what is wanted.
    """
    if not 0 < low <= high or not 0 < share <= 1 or tolerance <= 1 or not full > 0:
        raise ValueError(
            f"low={low}, high={high}, share={share}, tolerance={tolerance}, full={full}: wanted are 0 < low <= high, "
            "0 < share <= 1, tolerance above 1 and a positive metric."
        )
    wanted, tried = share * full, {}

    def reaches(d: int) -> bool:
        if d not in tried:
            tried[d] = float(fit(d))
            if not math.isfinite(tried[d]):
                raise ValueError(f"fit({d}) gave {tried[d]}: a finite metric is needed.")
        return tried[d] >= wanted

    if not reaches(high):
        raise ValueError(f"d={high} gives {tried[high]:.4g} and {wanted:.4g} is wanted: raise high.")
    if reaches(low):
        high = low
    while high > tolerance * low and high - low > 1:
        middle = min(high - 1, max(low + 1, round(math.sqrt(low * high))))
        if reaches(middle):
            high = middle
        else:
            low = middle
    return IntrinsicDimensionResult(high, wanted, tuple(sorted(tried.items())))
