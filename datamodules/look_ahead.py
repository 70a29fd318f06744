"""The training loader: it counts a whole optimizer step before its first backward, and resumes in mid-epoch exactly."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_peft.datamodules.resumable_sampler import ResumableSampler, world

Batch = Any


class _Bound(NamedTuple):
    prepare: Callable[[Batch], Batch]
    counts: Callable[[Batch], dict[str, int]]
    window: Callable[[int], int]


class _Mark(NamedTuple):
    batches: int  # of the epoch, consumed
    window_left: int  # batches of the accumulation window that are still to come
    dataset: dict[str, Any] | None  # a streaming data set's own state


class LookAheadDataLoader(DataLoader):
    """A `DataLoader` that puts the counts of the whole optimizer step on each batch and knows its place in the epoch.

    Once bound (a `FineTuningModule` binds the loaders it is trained with) it prepares each batch, fetches all batches
    of the accumulation window, and adds to each `"step_counts"`, the window's counts on this rank by term (one dict
    for the window), and `"step_start"` and `"step_end"`, whether the window begins or ends with it. Unbound it yields
    plain batches.

    Lightning saves and restores its state by itself; training resumed in mid-epoch then sees exactly the batches that
    were still to come, without loading the earlier ones. That is exact for samplers whose order depends on the epoch
    alone: the `ResumableSampler` used by default, and every `DistributedSampler`. Streaming data resumes by its own
    `state_dict` (exact but for shuffle buffers, see `datasets.IterableDataset.state_dict`) on one process without
    workers, and by replaying what was consumed otherwise.

    Args:
        dataset: A data set, or a streaming one.
        batch_size: Rows in a batch.
        shuffle: Shuffle every epoch.
        sampler: Another order; by default a `ResumableSampler`.
        batch_sampler: As for `DataLoader`.
        seed: Seed of the order.
        **kwargs: Further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset | Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler | Any | None = None,
        batch_sampler: Sampler | Any | None = None,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        # Lightning makes loaders anew from these arguments and their attributes when it injects a sampler.
        if sampler is None and batch_sampler is None and not isinstance(dataset, IterableDataset):
            sampler, shuffle = ResumableSampler(dataset, shuffle=bool(shuffle), seed=seed), None
        super().__init__(dataset, batch_size, shuffle, sampler, batch_sampler, **kwargs)
        self.seed = seed
        self._bound: _Bound | None = None
        self._epoch = -1
        self._resume: dict[str, Any] | None = None
        self._exhausted = False
        self._start = 0
        self._started = False  # the present iterator has given a batch
        # Lightning fetches one batch ahead of the one in training where the number of batches is unknown.
        self._ahead = 0
        self._marks: deque[_Mark] = deque([_Mark(0, 0, None)], maxlen=2)

    def bind(
        self,
        prepare: Callable[[Batch], Batch],
        counts: Callable[[Batch], dict[str, int]],
        window: Callable[[int], int],
    ) -> None:
        """Says what to do with batches from here on.

        Args:
            prepare: The batch to learn from.
            counts: Its denominators by term.
            window: How many micro-batches the accumulation window has that starts at this batch of the epoch. Fewer
                where the epoch has fewer left; batches that run out end it as well.
        """
        self._bound = _Bound(prepare, counts, window)
        self._ahead = int(self._started)

    # -- position -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position: JSON values only (and what a streaming data set has of its own)."""
        mark = self._marks[max(-1 - self._ahead, -len(self._marks))]
        if mark.window_left:
            rank_zero_warn(
                f"A checkpoint after batch {mark.batches} of the epoch stands inside an accumulation window: the "
                f"gradients summed so far are not in it. Let val_check_interval and other save points be multiples of "
                "accumulate_grad_batches."
            )
        return {"epoch": self._epoch, "exhausted": self._exhausted, "sizes": self._sizes(), **mark._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on from there, or the present one if it has only been looked into."""
        self._resume = state_dict
        self._epoch = state_dict["epoch"]
        self._exhausted = state_dict["exhausted"]
        self._marks.append(_Mark(*(state_dict[field] for field in _Mark._fields)))

    def _sizes(self) -> dict[str, int | None]:
        dataset: Any = self.dataset
        rows = None if isinstance(dataset, IterableDataset) else len(dataset)
        sampler = self._epoch_sampler
        replicas = getattr(sampler, "num_replicas", 1) if sampler is not None else world()[0]
        return {"rows": rows, "batch_size": self.batch_size, "replicas": replicas}

    @property
    def _epoch_sampler(self) -> Any | None:
        candidates = (self.sampler, getattr(self.batch_sampler, "sampler", None), self.batch_sampler)
        return next((s for s in candidates if isinstance(getattr(s, "epoch", None), int)), None)

    def _begin(self) -> _Mark:
        """Where the iterator that starts now has to begin: only here is the epoch known."""
        resume, self._resume = self._resume, None
        sampler = self._epoch_sampler
        if sampler is not None:
            same = resume is not None and sampler.epoch == resume["epoch"]
            self._epoch = sampler.epoch
        else:
            same = resume is not None and resume["epoch"] >= 0 and not resume["exhausted"]
            self._epoch += not same
        self._exhausted = False
        if resume is None or not same:
            return _Mark(0, 0, None)
        mark = _Mark(*(resume[field] for field in _Mark._fields))
        if mark.batches and resume["sizes"] != (now := self._sizes()):
            changed = ", ".join(f"{k} {resume['sizes'][k]} -> {now[k]}" for k in now if resume["sizes"][k] != now[k])
            raise ValueError(
                f"the checkpoint stands after batch {mark.batches} of an epoch of other data: {changed}. Resume with "
                "the same data, batch size and number of processes, or from a checkpoint at an epoch's end."
            )
        return mark

    # -- batches --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Nothing runs before the first batch is asked for: Lightning makes the iterator before it sets the epoch and
        # before the module binds.
        self._started = False
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        begin = self._begin()
        source = self._fetched(begin)
        self._marks.append(begin)
        index, left = begin.batches, begin.window_left  # `left`: resumed inside a window, it ends where it would have
        while True:
            bound = self._bound
            window = _take(source, (left or bound.window(index)) if bound else 1)
            if not window:
                break
            if bound:
                _complete([batch for batch, _ in window], bound)
            while window:
                batch, state = window.pop(0)
                index += 1
                self._marks.append(_Mark(index, len(window), state))
                self._started = True
                yield batch
                if self._resume is not None:
                    # The state came after Lightning had fetched ahead: the batch becomes the one it should have been.
                    begin = self._begin()
                    source = self._fetched(begin)
                    index, left = begin.batches, begin.window_left
                    for fresh, state in _take(source, 1):
                        _replaced(batch, fresh)
                        index += 1
                        self._marks.extend([begin, _Mark(index, 0, state)])
                if bound is None and self._bound is not None:
                    # Fetched before training began and still waiting to be handed over: completed where it is.
                    bound = self._bound
                    window = _take(source, (left or bound.window(index - 1)) - 1)
                    _complete([batch, *(batch for batch, _ in window)], bound)
                    self._marks[-1] = self._marks[-1]._replace(window_left=len(window))
            left = 0
        self._exhausted = True
        self._marks.append(self._marks[-1])

    def _fetched(self, begin: _Mark) -> Iterator[tuple[Batch, dict[str, Any] | None]]:
        """Batches from `begin` on, each with the state of a streaming data set after it."""
        dataset: Any = self.dataset
        streaming = isinstance(dataset, IterableDataset)
        stateful = streaming and hasattr(dataset, "state_dict") and self.num_workers == 0 and world()[0] == 1
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        replayed = 0
        if begin.batches and streaming:
            if stateful and begin.dataset is not None:
                dataset.load_state_dict(begin.dataset)
            else:
                replayed = begin.batches
        self._start = 0 if streaming else begin.batches
        if self._start and self._iterator is not None:
            self._iterator = None  # persistent workers of an earlier iteration know nothing of the new start
        # A DataLoader draws its workers' seed from the global generator: here it leaves the run's numbers alone.
        held = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed + self._epoch)
        iterator = super().__iter__()
        torch.set_rng_state(held)
        self._start = 0
        for number, batch in enumerate(iterator):
            if number >= replayed:
                yield batch, (dataset.state_dict() if stateful else None)

    @property
    def _index_sampler(self) -> Any:
        return _From(super()._index_sampler, self._start) if self._start else super()._index_sampler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}  # bound to a module in training: it stays where it is


class _From:
    """An index sampler whose first iteration begins at a later batch (persistent workers iterate it every epoch)."""

    def __init__(self, sampler: Any, start: int) -> None:
        self.sampler, self.start = sampler, start

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for number, indices in enumerate(self.sampler):
            if number >= start:
                yield indices

    def __len__(self) -> int:
        return len(self.sampler)


def _complete(window: list[Batch], bound: _Bound) -> None:
    """Prepares a window's batches in place and puts its counts on each."""
    total: dict[str, int] = {}
    for batch in window:
        _replaced(batch, bound.prepare(batch))
        for term, count in bound.counts(batch).items():
            total[term] = total.get(term, 0) + int(count)
    for place, batch in enumerate(window):
        batch["step_counts"] = total
        batch["step_start"], batch["step_end"] = place == 0, place == len(window) - 1


def _replaced(batch: Batch, content: Batch) -> None:
    if not isinstance(batch, MutableMapping):
        raise TypeError(f"a batch is a {type(batch).__name__}: FineTuningModule takes dictionaries of tensors.")
    content = dict(content)
    batch.clear()
    batch.update(content)


def _take(source: Iterator[Any], n: int) -> list[Any]:
    return list(itertools.islice(source, n))
