"""The measures of `benchmarks/peft_runs.py`: how bodies begin, and what its table shows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from peft_runs import METHODS, beginnings, table

TEXTS = {1: "\n   ", 2: " return", 3: " self", 4: "\n", 5: "<end>"}


@pytest.mark.parametrize(
    ("tokens", "hits", "expected"),
    [
        # blank, first word, rest of the line, its end, the next line
        ([1, 2, 3, 4, 3], [1, 1, 1, 1, 1], (True, True)),
        ([1, 2, 3, 4, 3], [1, 1, 1, 1, 0], (True, True)),
        ([1, 2, 3, 4, 3], [1, 1, 1, 0, 1], (True, False)),  # the line would have gone on
        ([1, 2, 3, 4, 3], [1, 1, 0, 1, 1], (True, False)),
        ([1, 2, 3, 4, 3], [1, 0, 1, 1, 1], (False, False)),
        ([1, 2, 3, 4, 3], [0, 1, 1, 1, 1], (False, False)),  # greedy decoding would not have come there
        ([2, 3, 5], [1, 1, 0], (True, False)),  # a body of one line ends with its turn
        ([2, 3, 5], [1, 1, 1], (True, True)),
    ],
)
def test_how_a_body_begins(tokens, hits, expected):
    """Beside a row that is all wrong, whose tokens stand before it."""
    place = torch.arange(len(tokens))
    units = SimpleNamespace(
        index=torch.cat([place + 1, 20 + place + 3]),
        labels=torch.tensor(tokens * 2),
        is_argmax=torch.tensor([0] * len(tokens) + hits).bool(),
    )
    outputs = {"terms": SimpleNamespace(units=units)}
    made = beginnings(outputs, {"labels": torch.zeros(2, 20)}, TEXTS.__getitem__)
    assert made == [(False, False), expected]


def test_a_refusal_is_a_row_of_its_own():
    measured = {"loss": 2.0, "word": 0.5, "line": 0.1, "token": 0.6}
    cost = {"seconds": 1.0, "peak": 900.0, "trained": 1234, "saved": 0.5}
    heads, *rows = table(
        {"untuned": measured, "full": measured | cost, "BitFit": {"refused": "no biases"}}
    ).splitlines()
    assert heads.split()[:3] == ["loss", "word", "line"]
    assert rows[0].split() == ["untuned", "2.0000", "0.500", "0.100", "0.600"]
    assert rows[1].split()[-2:] == ["1,234", "0.50"]
    assert rows[2].split(maxsplit=1) == ["BitFit", "n/a: no biases"]


def test_every_method_makes_its_callbacks():
    for name, method in METHODS.items():
        assert method.rate >= 0
        assert isinstance(method.callbacks(), list), name
