"""Look-ahead counts against brute force, and resuming: what comes after the state is what would have come."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader, ResumableSampler


def collate(rows):
    return {"ids": torch.tensor(rows), "sizes": torch.tensor([row % 5 for row in rows])}


def bind(loader, accumulate=1, limit=10**9, prepare=lambda batch: batch):
    total = min(len(loader) if not isinstance(loader.dataset, IterableDataset) else 10**9, limit)

    def window(batch_idx):
        return min(accumulate, total - batch_idx)

    loader.bind(prepare, lambda batch: {"loss": int(batch["sizes"].sum()), "rows": len(batch["ids"])}, window)


def epoch(loader, number, batches=None):
    """Rows and annotations of the epoch's next batches."""
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(number)
    out = []
    for batch in loader:
        out.append((batch["ids"].tolist(), batch.get("step_counts"), batch.get("step_start")))
        if len(out) == batches:
            break
    return out


@pytest.mark.parametrize(
    ("accumulate", "limit", "workers"),
    [(1, 99, 0), (2, 99, 0), (3, 99, 0), (3, 99, 2), (20, 99, 0), (1, 5, 0), (2, 5, 0), (3, 5, 0), (20, 5, 0)],
)
def test_counts_equal_brute_force(accumulate, limit, workers):
    loader = LookAheadDataLoader(range(29), batch_size=4, shuffle=True, seed=5, collate_fn=collate, num_workers=workers)
    bind(loader, accumulate, limit)
    got = epoch(loader, 2, limit)
    plain = DataLoader(range(29), batch_size=4, sampler=ResumableSampler(range(29), seed=5), collate_fn=collate)
    plain.sampler.set_epoch(2)
    batches = list(plain)[:limit]
    assert [ids for ids, _, _ in got] == [batch["ids"].tolist() for batch in batches]
    for begin in range(0, len(batches), accumulate):
        window = batches[begin : begin + accumulate]
        expected = {"loss": sum(int(b["sizes"].sum()) for b in window), "rows": sum(len(b["ids"]) for b in window)}
        for place in range(len(window)):
            _, counts, start = got[begin + place]
            assert counts == expected
            assert start == (place == 0)
            assert counts is got[begin][1]  # one dictionary a window: what adds the ranks' counts up does it once


def test_window_may_change_from_step_to_step():
    loader = LookAheadDataLoader(range(10), batch_size=1, collate_fn=collate)
    asked = []

    def window(batch_idx):
        asked.append(batch_idx)
        return 1 if batch_idx < 3 else 4

    loader.bind(lambda batch: batch, lambda batch: {"n": 1}, window)
    assert [counts["n"] for _, counts, _ in epoch(loader, 0)] == [1, 1, 1, 4, 4, 4, 4, 3, 3, 3]
    assert asked == [0, 1, 2, 3, 7, 10]


def test_counts_are_those_of_the_prepared_batch():
    loader = LookAheadDataLoader(range(8), batch_size=2, collate_fn=collate)
    bind(loader, 2, prepare=lambda batch: {**batch, "sizes": batch["sizes"] * 10, "new": 1})
    batches = list(loader)
    assert batches[0]["step_counts"]["loss"] == 10 * (0 + 1 + 2 + 3)
    assert all(batch["new"] == 1 for batch in batches)


def test_unbound_it_is_a_plain_loader():
    loader = LookAheadDataLoader(range(5), batch_size=2, collate_fn=collate)
    assert epoch(loader, 0) == [([0, 1], None, None), ([2, 3], None, None), ([4], None, None)]
    assert len(loader) == 3


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize(("done", "workers", "persistent"), [(2, 0, False), (4, 0, False), (2, 2, False), (2, 2, True)])
def test_resume_is_exact(done, ranks, rank, workers, persistent):
    def make():
        sampler = ResumableSampler(range(47), ranks, rank, seed=7)
        loader = LookAheadDataLoader(
            range(47),
            batch_size=3,
            sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=persistent,
        )
        bind(loader, 2)
        return loader

    whole = make()
    expected = [epoch(whole, number) for number in (0, 1, 2)]
    stopped = make()
    assert epoch(stopped, 0) == expected[0]
    assert epoch(stopped, 1, done) == expected[1][:done]
    state = torch.load(_saved(stopped.state_dict()), weights_only=True)
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a checkpoint written before the first resumed batch
    assert epoch(resumed, 1) == expected[1][done:]
    assert epoch(resumed, 2) == expected[2]


def _saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_resumed_epoch_does_not_load_what_it_skips():
    loaded = []

    class Noting:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            loaded.append(int(index))
            return index

    loader = LookAheadDataLoader(Noting(), batch_size=2, collate_fn=collate)
    epoch(loader, 0, 4)
    state, loaded[:] = loader.state_dict(), []
    again = LookAheadDataLoader(Noting(), batch_size=2, collate_fn=collate)
    again.load_state_dict(state)
    epoch(again, 0)
    assert loaded == [8, 9, 10, 11]


def test_state_at_the_end_of_an_epoch_goes_on_with_the_next():
    loader = LookAheadDataLoader(range(9), batch_size=2, shuffle=True, collate_fn=collate)
    epoch(loader, 0)
    resumed = LookAheadDataLoader(range(9), batch_size=2, shuffle=True, collate_fn=collate)
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed, 1) == epoch(loader, 1)


def test_state_inside_a_window_is_told_and_ends_that_window_where_it_would_have_ended():
    loader = LookAheadDataLoader(range(9), batch_size=1, collate_fn=collate)
    bind(loader, 3)
    expected = epoch(loader, 0)
    epoch(loader, 0, 4)
    with pytest.warns(UserWarning, match="inside an accumulation window"):
        state = loader.state_dict()
    resumed = LookAheadDataLoader(range(9), batch_size=1, collate_fn=collate)
    bind(resumed, 3)
    resumed.load_state_dict(state)
    got = epoch(resumed, 0)
    assert [ids for ids, _, _ in got] == [[4], [5], [6], [7], [8]]
    assert [start for *_, start in got] == [True, False, True, False, False]
    assert got[0][1] == {"loss": 4 + 0, "rows": 2}
    assert got[2:] == expected[6:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dataset": range(20), "batch_size": 4}, "batch_size 2 -> 4"), ({"dataset": range(22), "batch_size": 2}, "rows")],
)
def test_resume_on_other_data_is_refused(arguments, message):
    loader = LookAheadDataLoader(range(20), batch_size=2, collate_fn=collate)
    epoch(loader, 0, 3)
    other = LookAheadDataLoader(**arguments, collate_fn=collate)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=message):
        next(iter(other))


def test_iterating_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch(LookAheadDataLoader(range(4), shuffle=True, collate_fn=collate), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bound_loader_can_be_copied_and_pickled():
    loader = LookAheadDataLoader(range(6), batch_size=2, collate_fn=collate)
    bind(loader, 2)
    for copied in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        bind(copied, 2)
        assert epoch(copied, 0) == epoch(loader, 0)


def test_a_batch_that_is_no_dictionary_is_refused():
    loader = LookAheadDataLoader(range(4), batch_size=2)
    loader.bind(lambda batch: batch, lambda batch: {}, lambda batch_idx: 1)
    with pytest.raises(TypeError, match="Tensor"):
        next(iter(loader))


class Stream(IterableDataset):
    """No length and no state of its own."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def _streams():
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(23))})
    return {
        "plain": lambda: Stream(23),
        "datasets": lambda: rows.to_iterable_dataset(num_shards=3).map(lambda row: row),
        "shuffled": lambda: rows.to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=1),
    }


@pytest.mark.parametrize("kind", ["plain", "datasets", "shuffled"])
@pytest.mark.parametrize(("done", "workers"), [(0, 0), (4, 0), (8, 0), (4, 1)])
def test_streams_resume(kind, workers, done):
    def make():
        dataset = _streams()[kind]()
        loader = LookAheadDataLoader(
            dataset,
            batch_size=2,
            num_workers=workers,
            collate_fn=collate if kind == "plain" else collate_rows,
        )
        bind(loader, 4)
        return loader

    whole = make()
    expected = [epoch(whole, number) for number in (0, 1)]
    assert sorted(row for ids, *_ in expected[0] for row in ids) == list(range(23))
    stopped = make()
    if done:
        epoch(stopped, 0, done)
    state = torch.load(_saved(stopped.state_dict()), weights_only=True)
    resumed = make()
    resumed.load_state_dict(state)
    assert [ids for ids, *_ in epoch(resumed, 0)] == [ids for ids, *_ in expected[0][done:]]
    assert epoch(resumed, 1) == expected[1]


def collate_rows(rows):
    return collate([row["n"] for row in rows])


def test_a_batch_fetched_before_binding_is_completed_and_does_not_count_as_consumed():
    """Lightning fetches one batch ahead, before training starts, from loaders without a length."""
    loader = LookAheadDataLoader(Stream(9), batch_size=1, collate_fn=collate)
    iterator = iter(loader)
    first = next(iterator)
    assert "step_counts" not in first
    bind(loader, 2)
    assert loader.state_dict()["batches"] == 0
    second = next(iterator)
    assert (first["step_start"], second["step_start"]) == (True, False)
    assert first["step_counts"] is second["step_counts"]
    assert first["step_counts"]["loss"] == 0 + 1
    # `first` trains while `second` waits.
    with pytest.warns(UserWarning, match="inside an accumulation window"):
        assert loader.state_dict()["batches"] == 1
    third = next(iterator)
    assert third["step_start"]
    assert loader.state_dict()["batches"] == 2
    assert len(list(iterator)) == 6
    assert loader.state_dict()["batches"] == 9


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("dataset", [range(20), Stream(20)], ids=["rows", "stream"])
def test_a_state_that_comes_after_the_iterator_was_made(dataset, fetched):
    loader = LookAheadDataLoader(dataset, batch_size=2, collate_fn=collate)
    bind(loader, 2)
    expected = epoch(loader, 0)
    epoch(loader, 0, 4)
    state = loader.state_dict()
    late = LookAheadDataLoader(dataset, batch_size=2, collate_fn=collate)
    iterator = iter(late)
    got = [next(iterator)] if fetched else []
    late.load_state_dict(state)
    bind(late, 2)
    got += list(iterator)
    assert [(b["ids"].tolist(), b["step_counts"], b["step_start"]) for b in got] == expected[4:]
    assert late.state_dict()["batches"] == 10
