"""Pairs of texts: literal batches, repeated rows, the standard library's docstrings and bodies."""

from __future__ import annotations

import ast

import pytest
import torch

from lightning_peft.datamodules import StandardLibraryPairs, TextPairData
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex
from lightning_peft.datamodules.standard_library import split_of_module, standard_library_functions
from tests.tiny import tiny_tokenizer

ROWS = [{"query": "a b", "document": "c"}, {"query": "d", "document": "e f g"}, {"query": "h", "document": "i"}]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def test_literal():
    data = TextPairData(ROWS, tokenizer=tiny_tokenizer(), shuffle=False, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["query"]["input_ids"].tolist() == [ids("a b"), [*ids("d"), 0]]
    assert batch["query"]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["document"]["input_ids"].tolist() == [[*ids("c"), 0, 0], ids("e f g")]
    assert batch["labels"].tolist() == [0, 0]


def test_prefixes_columns_and_the_cut():
    rows = [{"question": "a b c d", "passage": "e"}]
    columns = {"query_column": "question", "document_column": "passage", "query_prefix": "one ", "max_length": 3}
    data = TextPairData(rows, tokenizer=tiny_tokenizer(), document_prefix="two ", **columns)
    data.setup("fit")
    row = data.rows("train")[0]
    assert row["query_tokens"].tolist() == ids("one a b")
    assert row["document_tokens"].tolist() == ids("two e")


def test_a_row_that_fills_up_is_marked():
    data = TextPairData(ROWS, tokenizer=tiny_tokenizer())
    data.setup("fit")
    rows = data.rows("train")
    assert data.collate_fn()([rows[1], rows[RepeatedIndex(0)]])["labels"].tolist() == [0, -100]


def test_docstrings_and_bodies_split_by_module():
    data = StandardLibraryPairs(max_examples=50, tokenizer=tiny_tokenizer())
    raw = data.read()
    modules = {row["completion"]: row["module"] for row in standard_library_functions()}
    for split, rows in raw.items():
        for row in rows:
            assert split_of_module(modules[row["document"]], 0.1, 0.1) == split
            assert "\n" not in row["query"]
            assert "def " not in row["query"][:4]
    row = next(row for row in standard_library_functions() if row["name"] == "getcwdb" or row["module"] == "bisect")
    expected = ast.get_docstring(ast.parse(row["prompt"]).body[0])
    assert expected is not None
    from lightning_peft.datamodules.text_pairs import docstring

    assert docstring(row["prompt"]).split() == expected.split()
    assert docstring('def f(a="x"):\n    """Says\n    what."""\n') == "Says what."


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS, {"query_column": "question"}, r"lack \['question'\]"),
        ([{"query": " ", "document": "b"}], {}, "query=' '"),
        (ROWS, {"packing": True}, "neither packed nor streamed"),
        (ROWS, {"max_length": 0}, "max_length=0"),
    ],
)
def test_what_it_needs_is_said(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        TextPairData(rows, tokenizer=tiny_tokenizer(), **arguments).setup("fit")


def test_negatives_of_a_repeated_row_do_not_count():
    """A batch with a row that fills up is the batch without it."""
    from lightning_peft.models import TextEncoder
    from tests.tiny import tiny_bert

    module = TextEncoder(tiny_bert(head="BertModel")).eval()
    data = TextPairData(ROWS, tokenizer=tiny_tokenizer())
    data.setup("fit")
    rows, collate = data.rows("train"), data.collate_fn()
    with_it, without = collate([rows[0], rows[1], rows[RepeatedIndex(0)]]), collate([rows[0], rows[1]])
    assert module.counts(with_it) == module.counts(without) == {"loss": 2}
    losses = [module.terms(batch, {"loss": torch.tensor(2.0)}).loss for batch in (with_it, without)]
    torch.testing.assert_close(*losses)
