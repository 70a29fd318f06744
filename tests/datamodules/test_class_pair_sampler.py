"""Pairs of classes: their frequencies, their rows, ranks, resumption in mid-epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_peft.datamodules import ClassPairs, ClassPairSampler, LookAheadDataLoader
from lightning_peft.datamodules.class_pair_sampler import ClassPair

LABELS = [0] * 9 + [1] * 4 + [2] * 2 + [-100] * 3


def distribution() -> torch.Tensor:
    return torch.tensor([[0.05, 0.2, 0.0], [0.1, 0.05, 0.25], [0.2, 0.05, 0.1]]).double()


def test_pairs_follow_the_distribution_and_rows_are_uniform_within_a_class():
    sampler = ClassPairSampler(LABELS, pairs=20_000)
    sampler.set_pairs(distribution(), minimum=0.7)
    drawn = list(sampler)
    classes = np.array([[LABELS[pair.first], LABELS[pair.second]] for pair in drawn])
    observed = np.zeros((3, 3))
    np.add.at(observed, tuple(classes.T), 1)
    possible = distribution().numpy() > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], distribution().numpy()[possible] * 20_000).pvalue > 1e-3
    for column in ("first", "second"):
        rows = np.bincount([getattr(pair, column) for pair in drawn], minlength=18)
        assert rows[15:].sum() == 0  # rows without a label
        assert stats.chisquare(rows[:9]).pvalue > 1e-3
    coefficients = np.array([pair.coefficient for pair in drawn])
    assert stats.kstest(coefficients, "uniform", args=(0.7, 0.3)).pvalue > 1e-3


def test_ranks_take_turns_in_one_sequence():
    def drawn(**ranks) -> list[ClassPair]:
        sampler = ClassPairSampler(LABELS, pairs=11, seed=3, **ranks)
        sampler.set_epoch(2)
        return list(sampler)

    whole = drawn()
    ranks = [drawn(num_replicas=2, rank=rank) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    assert [pair for pairs in zip(*ranks) for pair in pairs][:11] == whole
    assert drawn() == whole
    other = ClassPairSampler(LABELS, pairs=11, seed=3)
    assert list(other) != whole  # another epoch


def test_a_new_distribution_holds_from_the_next_place_on():
    sampler = ClassPairSampler(LABELS, pairs=40)
    before, now = iter(sampler), []
    for place, pair in enumerate(before):
        now.append(pair)
        if place == 19:
            sampler.set_pairs(torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert {(LABELS[pair.first], LABELS[pair.second]) for pair in now[20:]} == {(1, 1)}
    assert {LABELS[pair.first] for pair in now[:20]} == {0, 1, 2}


def test_classes_without_a_row_are_left_out():
    sampler = ClassPairSampler(LABELS, partner_labels=[2, 2, 0], pairs=50)
    wide = torch.full((4, 4), 1.0)
    sampler.set_pairs(wide)
    assert (sampler.distribution[3] == 0).all()
    assert (sampler.distribution[:, 1] == 0).all()  # no partner of class 1
    assert float(sampler.distribution.sum()) == pytest.approx(1)
    sampler.set_pairs(wide, partner_labels=torch.tensor([1, 1, 1]))
    assert {pair.second for pair in sampler} == {0, 1, 2}
    assert (sampler.distribution[:, 1] > 0).sum() == 3
    with pytest.raises(ValueError, match="no pair of classes has rows"):
        sampler.set_pairs(torch.tensor([[1.0, 0, 1], [1, 0, 1], [1, 0, 1]]))
    with pytest.raises(ValueError, match="no row has a class"):
        ClassPairSampler([-100, -100])
    with pytest.raises(ValueError, match="call set_pairs"):
        list(ClassPairSampler(LABELS, partner_labels=[]))


def rows() -> list[dict]:
    return [{"pixel_values": torch.full((1, 2, 2), float(i)), "labels": torch.tensor(c)} for i, c in enumerate(LABELS)]


def test_batches_hold_both_rows_and_the_coefficient():
    sampler = ClassPairSampler(LABELS, pairs=6)
    pairs = list(sampler)
    (batch,) = LookAheadDataLoader(ClassPairs(rows()), batch_size=6, sampler=sampler)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [pair.first for pair in pairs]
    assert batch["partner_pixel_values"][:, 0, 0, 0].tolist() == [pair.second for pair in pairs]
    assert batch["labels"].tolist() == [LABELS[pair.first] for pair in pairs]
    torch.testing.assert_close(batch["mixup"], torch.tensor([pair.coefficient for pair in pairs]))
    assert torch.equal(ClassPairs(rows())[4]["pixel_values"], rows()[4]["pixel_values"])


def test_a_resumed_loader_goes_on_with_the_same_pairs():
    def loader() -> LookAheadDataLoader:
        sampler = ClassPairSampler(LABELS, pairs=12)
        sampler.set_pairs(distribution())
        return LookAheadDataLoader(ClassPairs(rows()), batch_size=3, sampler=sampler)

    whole = [batch["mixup"] for batch in loader()]
    first = loader()
    taken = iter(first)
    next(taken), next(taken)
    state = first.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert all(torch.equal(a["mixup"], b) for a, b in zip(again, whole[2:], strict=True))
