"""Docstring to code from the running Python's own sources."""

import ast
import hashlib
import json
import subprocess
import sys

import pytest
import torch

from lightning_peft.datamodules.standard_library import _functions, split_of_module, standard_library_functions
from lightning_peft.datamodules.standard_library_code import StandardLibraryCode
from tests.tiny import tiny_tokenizer

SOURCE = '''
def plain(a, b=2):
    """Adds."""
    # why
    total = a + b
    return total


class Thing:
    @property
    def held(self) -> str:
        """Two
        lines.
        """

        if self:
            return """text
    at its own indent"""


def bare():
    return 1

def only():
    """Nothing else."""

def one_line(): """Doc."""; return 1
'''


def test_literal():
    rows = _functions(SOURCE, "m")
    assert rows == [
        {
            "module": "m",
            "name": "plain",
            "prompt": 'def plain(a, b=2):\n    """Adds."""\n',
            "completion": "    # why\n    total = a + b\n    return total\n",
        },
        {
            "module": "m",
            "name": "held",
            "prompt": 'def held(self) -> str:\n    """Two\n    lines.\n    """\n',
            "completion": '    if self:\n        return """text\nat its own indent"""\n',
        },
    ]


def test_rows_are_whole_functions_of_the_library():
    rows = standard_library_functions()
    assert len(rows) > 2000
    for row in rows:
        function = ast.parse(row["prompt"] + row["completion"]).body[0]
        assert function.name == row["name"]
        assert ast.get_docstring(function)
    names = {(row["module"], row["name"]) for row in rows}
    assert ("bisect", "insort_right") in names
    assert not {row["module"].split(".")[0] for row in rows} & {"test", "idlelib", "site-packages"}
    assert len({row["completion"] for row in rows}) == len(rows)


def test_limits():
    rows = standard_library_functions(max_chars=300, min_chars=100)
    assert all(len(row["prompt"]) + len(row["completion"]) <= 300 for row in rows)
    assert all(len(row["completion"].strip()) >= 100 for row in rows)


def test_the_same_in_another_process():
    code = (
        "import hashlib, json; from lightning_peft.datamodules.standard_library import *;"
        "print(hashlib.sha256(json.dumps(standard_library_functions()).encode()).hexdigest())"
    )
    own = hashlib.sha256(json.dumps(standard_library_functions()).encode()).hexdigest()
    env = {"PYTHONHASHSEED": "123", "PATH": "/usr/bin"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert other.stdout.strip() == own


def test_splits_are_by_module_and_near_their_fractions():
    rows = standard_library_functions()
    sides = {module: split_of_module(module, 0.1, 0.1) for module in {row["module"] for row in rows}}
    for split in ("validation", "test"):
        assert 0.05 < sum(side == split for side in sides.values()) / len(sides) < 0.15
        assert 0.05 < sum(sides[row["module"]] == split for row in rows) / len(rows) < 0.15
    # Larger fractions only take from the training split.
    assert all(split_of_module(m, 0.1, 0.3) == "test" for m, side in sides.items() if side == "test")
    made = StandardLibraryCode(tokenizer=tiny_tokenizer(None)).read()
    texts = {split: set(part["completion"]) for split, part in made.items()}
    for split, part in texts.items():
        assert {sides[row["module"]] for row in rows if row["completion"] in part} == {split}


def test_conversations_with_a_template_and_plain_without():
    made = StandardLibraryCode(tokenizer=tiny_tokenizer(), max_examples=20, max_length=256)
    made.setup("fit")
    batch = next(iter(made.train_dataloader()))
    assert batch["input_ids"][0, :3].tolist() == [3, 7, 5]
    plain = StandardLibraryCode(tokenizer=tiny_tokenizer(None), max_examples=20, max_length=256)
    plain.setup("fit")
    row = plain._raw["train"][0]
    assert set(row) == {"prompt", "completion"}
    assert len(plain._raw["train"]) == 20
    whole = StandardLibraryCode(tokenizer=tiny_tokenizer(None)).read()
    assert 0.5 < len(plain._raw["validation"]) / (20 * len(whole["validation"]) / len(whole["train"])) < 2
    again = StandardLibraryCode(tokenizer=tiny_tokenizer(), max_examples=20, max_length=256)
    again.setup("fit")
    other = next(iter(again.train_dataloader()))
    assert all(torch.equal(batch[key], other[key]) for key in batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": 0.6, "test": 0.4}, "add up to less than 1"),
        ({"max_examples": 0}, "max_examples=0"),
        ({"max_chars": 10}, "no documented function"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StandardLibraryCode(tokenizer=tiny_tokenizer(), **arguments).setup("fit")
