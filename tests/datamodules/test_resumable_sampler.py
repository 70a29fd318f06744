"""The order of an epoch: that of DistributedSampler, on any number of ranks, with repeats that can be told."""

import pytest
from torch.utils.data import DistributedSampler

from lightning_peft.datamodules.look_ahead import ResumableSampler
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("rows", "ranks", "drop_last"),
    [(10, 1, False), (10, 2, False), (11, 2, False), (7, 3, False), (2, 5, False), (10, 2, True), (7, 3, True)],
)
def test_order_is_that_of_distributed_sampler(rows, ranks, shuffle, drop_last):
    for rank in range(ranks):
        arguments = {"num_replicas": ranks, "rank": rank, "shuffle": shuffle, "seed": 3, "drop_last": drop_last}
        ours, theirs = ResumableSampler(range(rows), **arguments), DistributedSampler(range(rows), **arguments)
        for epoch in (0, 1, 5):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)
            assert len(list(ours)) == len(ours) == len(theirs)


@pytest.mark.parametrize(("rows", "ranks"), [(10, 2), (11, 2), (7, 3), (2, 5)])
def test_every_row_counts_once(rows, ranks):
    seen = [i for rank in range(ranks) for i in ResumableSampler(range(rows), ranks, rank)]
    assert sorted(i for i in seen if not isinstance(i, RepeatedIndex)) == list(range(rows))
    assert len(seen) % ranks == 0


def test_validation_order_is_the_data_sets_own():
    sampler = ResumableSampler(range(6), shuffle=False)
    sampler.set_epoch(9)
    assert list(sampler) == [0, 1, 2, 3, 4, 5]


def test_works_on_one_process_without_a_process_group():
    sampler = ResumableSampler(range(6), seed=1)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (1, 0, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "empty"),
        ({"dataset": range(4), "num_replicas": 2, "rank": 2}, "rank=2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumableSampler(**arguments)


def test_drop_last_that_leaves_nothing():
    with pytest.raises(ValueError, match="drop_last=False"):
        len(ResumableSampler(range(3), num_replicas=4, rank=0, drop_last=True))
