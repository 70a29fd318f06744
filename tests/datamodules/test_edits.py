"""Edits: the formats of the data sets, literal tokens, the two orders, refusals."""

from __future__ import annotations

import pytest

from lightning_peft.datamodules import EditData
from lightning_peft.datamodules.edits import as_edit, edit_text
from tests.tiny import tiny_tokenizer

OWN = {"prompt": "a b", "target_new": "c", "rephrase": "b a", "locality": "d e"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (OWN, OWN),
        ({"src": "a b", "alt": "c", "rephrase": "b a", "loc": "d e"}, OWN),  # zsRE
        ({"update": "a b", "ans": "c", "rephrase": "b a", "loc": "d e"}, OWN),  # WikiBigEdit
        (
            {  # CounterFact
                "requested_rewrite": {"prompt": "a {}", "subject": "b", "target_new": {"str": "c", "id": "Q1"}},
                "paraphrase_prompts": ["b a", "x"],
                "neighborhood_prompts": ["d e", "y"],
            },
            OWN,
        ),
        (
            {"prompt": "a", "target_new": "c", "locality": ""},
            {"prompt": "a", "target_new": "c", "rephrase": None, "locality": None},
        ),
    ],
)
def test_formats(row, expected):
    assert as_edit(row) == expected
    assert edit_text(row) == {"prompt": expected["prompt"], "completion": " c"}


def test_the_target_and_its_end_are_learnt_and_nothing_else():
    tokenizer = tiny_tokenizer()
    data = EditData([OWN], tokenizer=tokenizer)
    data.setup("fit")
    row = data.rows("train")[0]
    c, end = tokenizer("c")["input_ids"][0], tokenizer.eos_token_id
    assert row["input_ids"].tolist() == [*tokenizer("a b")["input_ids"], c, end]
    assert row["labels"].tolist() == [-100, -100, c, end]


def test_breadth_shuffles_all_edits_every_epoch():
    rows = [{"prompt": word, "target_new": "z"} for word in "abcdefgh"]
    data = EditData(rows, tokenizer=tiny_tokenizer(), batch_size=4)
    data.setup("fit")
    loader, orders = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        orders.append([int(ids[0]) for batch in loader for ids in batch["input_ids"]])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_depth_is_one_edit_after_the_other():
    rows = [{"prompt": word, "target_new": "z"} for word in "abc"]
    data = EditData(rows, tokenizer=tiny_tokenizer(), order="depth", depth_steps=3)
    data.setup("fit")
    seen = [tiny_tokenizer().decode(batch["input_ids"][0, :1]) for batch in data.train_dataloader()]
    assert seen == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "a"}], {}, "no target_new"),
        ([{"target_new": "a"}], {}, "no prompt"),
        ([{"prompt": "a", "target_new": " "}], {}, r"no target_new \(or an empty one\)"),
        ([OWN], {"order": "width"}, "order='width'"),
        ([OWN], {"depth_steps": 0}, "depth_steps=0"),
        ([OWN], {"packing": True}, "an edit is a row"),
        ([OWN], {"max_length": 2}, "longer than max_length=2"),
    ],
)
def test_what_it_needs_is_said(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        EditData(rows, tokenizer=tiny_tokenizer(), **arguments).setup("fit")
