"""Packing: which documents share a row, and what the row says of them."""

import random

import numpy as np
import pytest

from lightning_peft.datamodules.packing import best_fit_decreasing, packed_row


def slow_best_fit(lengths, capacity):
    """The definition, without data structures."""
    rows, room = [], []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(room[r], r) for r in range(len(rows)) if room[r] >= lengths[document]]
        if fitting:
            row = min(fitting)[1]
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(document)
        room[row] -= lengths[document]
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_definition(seed):
    draw = random.Random(seed)
    capacity = draw.randint(3, 200)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 120))]
    rows = best_fit_decreasing(lengths, capacity)
    assert rows == slow_best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


def test_literal():
    assert best_fit_decreasing([3, 6, 2, 4], 8) == [[1, 2], [3, 0]]
    assert best_fit_decreasing([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert best_fit_decreasing([8], 8) == [[0]]


@pytest.mark.parametrize(("lengths", "message"), [([3, 9], "document 1 has 9"), ([0], "document 0 has 0")])
def test_documents_that_no_row_takes(lengths, message):
    with pytest.raises(ValueError, match=message):
        best_fit_decreasing(lengths, 8)


def test_row():
    row = packed_row(
        [
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weight": 2.0},
            {"input_ids": [8, 9], "labels": [-100, 9], "weight": 0.5},
        ]
    )
    assert {key: value.tolist() for key, value in row.items()} == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, 6, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
        "document_ids": [0, 0, 0, 1, 1],
        "weight": [2.0, 2.0, 2.0, 0.5, 0.5],
    }


def test_row_leaves_its_documents_alone():
    labels = np.array([5, 6])
    packed_row([{"input_ids": np.array([5, 6]), "labels": labels}])
    assert labels.tolist() == [5, 6]
