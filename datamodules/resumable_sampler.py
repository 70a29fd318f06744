"""The order of an epoch as a function of the seed and the epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler


class RepeatedIndex(int):
    """An index that stands in an epoch for the second time, to give every rank equally many rows.

    A plain integer to any dataset. `InstructionData`'s rows answer it with every label masked, so that the repeated row
    counts for nothing, in training and in validation.
    """


class ResumableSampler(DistributedSampler):
    """The order of an epoch as a function of the seed and the epoch alone, for any number of processes.

    The order is that of `torch.utils.data.DistributedSampler`. Being one, Lightning calls its `set_epoch` and leaves it
    in place; unlike it, it also works on one process and before the process group exists. Where the rows do not divide
    by the ranks, the first rows of the epoch fill up the last ones as `RepeatedIndex` (so all ranks run equally many
    batches), or with `drop_last` the remainder is left out.

    Args:
        dataset: A data set with a length.
        num_replicas: Processes that see different data; by default those of the process group, else 1.
        rank: This process among them; by default that of the process group, else 0.
        shuffle: Shuffle every epoch. Without, rows come in order, as for validation.
        seed: Seed of the order; the same on all ranks.
        drop_last: Leave out the rows that do not divide by the ranks, rather than repeat some.

    Raises:
        ValueError: The data set is empty, or `drop_last` would leave nothing, or `rank` is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        # Not super().__init__(): it asks the process group, which does not exist yet when a script builds its loader.
        if len(dataset) == 0:
            raise ValueError("the data set is empty: there is nothing to sample from.")
        if rank is not None and not 0 <= rank < (num_replicas or math.inf):
            raise ValueError(f"rank={rank} must be in [0, num_replicas={num_replicas}).")
        self.dataset: Any = dataset
        self._num_replicas, self._rank = num_replicas, rank
        self.shuffle, self.seed, self.drop_last, self.epoch = shuffle, seed, drop_last, 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Processes that see different data."""
        return world()[0] if self._num_replicas is None else self._num_replicas

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This process among them."""
        return world()[1] if self._rank is None else self._rank

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Rows of this rank in an epoch; the same on every rank."""
        whole, rest = divmod(len(self.dataset), self.num_replicas)
        samples = whole if self.drop_last else whole + (rest > 0)
        if samples == 0:
            raise ValueError(
                f"{len(self.dataset)} rows over {self.num_replicas} ranks with drop_last=True leave none: "
                "set drop_last=False or use fewer processes."
            )
        return samples

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Rows of all ranks in an epoch."""
        return self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        order: Sequence[int] = range(len(self.dataset))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
        for place in range(self.rank, self.total_size, self.num_replicas):
            yield order[place] if place < len(order) else RepeatedIndex(order[place % len(order)])


def world() -> tuple[int, int]:
    """Processes and this one's rank, (1, 0) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
