"""Pairs of rows to be mixed, their classes drawn from a joint distribution that may change as training goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.datamodules.resumable_sampler import ResumableSampler


class ClassPair(NamedTuple):
    """Rows to mix: `coefficient` times the first, whose label is learnt, and the rest of the second."""

    first: int
    second: int
    coefficient: float


class ClassPairs(Dataset):
    """Rows with their partners: `partner_pixel_values` and the coefficient `mixup` beside the columns of the first.

    Args:
        rows: Labelled rows with `pixel_values` and `labels`.
        partners: Rows of which the second of a pair comes, such as unlabelled ones; by default `rows`.
    """

    def __init__(self, rows: Any, partners: Any | None = None) -> None:
        self.rows, self.partners = rows, partners

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """For rows whose augmentation depends on it."""
        for rows in (self.rows, self.partners):
            if hasattr(rows, "set_epoch"):
                rows.set_epoch(epoch)

    def __getitem__(self, pair: ClassPair | int) -> dict[str, Any]:
        if not isinstance(pair, ClassPair):
            return self.rows[pair]
        partner = (self.rows if self.partners is None else self.partners)[pair.second]
        mixup = torch.tensor(pair.coefficient, dtype=torch.float32)
        return {**self.rows[pair.first], "partner_pixel_values": partner["pixel_values"], "mixup": mixup}


class ClassPairSampler(ResumableSampler):
    """Pairs (y1, y2) ~ P, then for each class one of its rows, every row of a class equally likely.

    What is drawn at a place of an epoch depends on the seed, the epoch, the place and the P that holds when the place
    is reached: ranks take every R-th place of one sequence, and a run resumed in mid-epoch goes on with the same pairs.
    Classes without a row are left out of P. `SelectiveMixup` sets P; until then it is uniform.

    Loader workers are handed places ahead of time: with them a new P takes effect a few batches late, and a resumed run
    is not equal to the bit.

    Args:
        labels: Classes of the first rows; -100 is not drawn.
        partner_labels: Of the second rows where these are others; empty if `set_pairs` is to tell them.
        pairs: Pairs in an epoch, over all ranks; by default as many as there are labels.
        seed: Seed of the draws.
        num_replicas: As for `ResumableSampler`.
        rank: As for `ResumableSampler`.

    Raises:
        ValueError: No label is a class.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        partner_labels: Sequence[int] | Tensor | None = None,
        pairs: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        first = torch.as_tensor(labels, dtype=torch.long)
        if not (first >= 0).any():
            raise ValueError("no row has a class (a label of at least 0): there is nothing to pair.")
        super().__init__(range(pairs or len(first)), num_replicas, rank, shuffle=True, seed=seed)
        second = first if partner_labels is None else torch.as_tensor(partner_labels, dtype=torch.long)
        self._rows = [_rows_by_class(first), _rows_by_class(second)]
        self.minimum = 0.6
        self.distribution: Tensor | None = None
        if len(second):
            classes = max(len(rows) for rows in self._rows)
            self.set_pairs(torch.full((classes, classes), 1.0))

    def set_pairs(
        self, distribution: Tensor, minimum: float | None = None, partner_labels: Tensor | None = None
    ) -> None:
        """What is drawn from here on.

        Args:
            distribution: P [K, K], not necessarily normalised; rows are the first class.
            minimum: Least coefficient of the first row; the coefficient is uniform from there to 1.
            partner_labels: New classes of the second rows.

        Raises:
            ValueError: No pair of classes that both have rows has a positive probability.
        """
        if partner_labels is not None:
            self._rows[1] = _rows_by_class(partner_labels.cpu())
        self.minimum = self.minimum if minimum is None else minimum
        own = distribution.double().cpu().clone()
        for side, rows in enumerate(self._rows):
            empty = [c for c in range(len(own)) if c >= len(rows) or not len(rows[c])]
            own.index_fill_(side, torch.tensor(empty, dtype=torch.long), 0.0)
        if not own.sum() > 0:
            raise ValueError("no pair of classes has rows in the data and a positive probability.")
        self.distribution = own / own.sum()
        self._cumulated = self.distribution.flatten().cumsum(0)

    def __iter__(self) -> Iterator[ClassPair]:  # type: ignore[override]
        if self.distribution is None:
            raise ValueError("the second rows' classes are not known: train with SelectiveMixup, or call set_pairs.")
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        uniform = torch.rand(self.total_size, 4, generator=generator, dtype=torch.float64)
        for place in range(self.rank, self.total_size, self.num_replicas):
            yield self._drawn(uniform[place])

    def _drawn(self, uniform: Tensor) -> ClassPair:
        cell = int(torch.searchsorted(self._cumulated, uniform[0] * self._cumulated[-1], right=True))
        classes = divmod(min(cell, len(self._cumulated) - 1), math.isqrt(len(self._cumulated)))
        rows = [own[c] for own, c in zip(self._rows, classes)]
        first, second = (int(r[int(u * len(r))]) for r, u in zip(rows, uniform[1:3].tolist()))
        return ClassPair(first, second, self.minimum + (1 - self.minimum) * float(uniform[3]))


def _rows_by_class(labels: Tensor) -> list[Tensor]:
    """Numbers of the rows of each class."""
    return [(labels == c).nonzero().flatten() for c in range(int(labels.max()) + 1 if len(labels) else 0)]
