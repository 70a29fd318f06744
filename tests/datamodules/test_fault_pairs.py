"""Pairs of correct and wrong programs (paper 94): masks by hand, alignments by brute force, rows through the loader."""

from __future__ import annotations

import ast
import functools
import zlib

import numpy as np
import pytest
import torch

from lightning_peft.datamodules import FaultPairs, StandardLibraryFaultPairs
from lightning_peft.datamodules.code_mutation import mutated
from lightning_peft.datamodules.fault_pairs import (
    Encoded,
    aligned,
    changes,
    fault_masks,
    tokenize_pair,
    with_completion,
)
from lightning_peft.objectives import FaultAwareCausalLM
from tests.models.test_causal_lm import quiet_trainer
from tests.tiny import tiny_llama, tiny_tokenizer


def words(text: str) -> Encoded:
    """A token for each word with the blank before it, as BPE has it; a newline is its own."""
    spans, at = [], 0
    while at < len(text):
        end = at + 1
        if text[at] != "\n":
            while end < len(text) and text[end] not in " \n":
                end += 1
        spans.append((at, end))
        at = end
    return Encoded([zlib.crc32(text[a:b].encode()) for a, b in spans], spans)


def characters(text: str) -> Encoded:
    return Encoded([ord(char) for char in text], [(i, i + 1) for i in range(len(text))])


def marked(correct: str, wrong: str, encode=words, granularity="token") -> tuple[list[str], list[str]]:
    """The pieces of both texts whose tokens are marked."""
    sides = encode(correct), encode(wrong)
    masks = fault_masks(*sides, changes(correct, wrong, granularity))
    return tuple(  # type: ignore[return-value]
        [text[a:b] for (a, b), mark in zip(side.spans, mask) if mark]
        for text, side, mask in zip((correct, wrong), sides, masks)
    )


def test_a_boundary_marks_the_operator():
    assert marked("if a < b:\n    pass\n", "if a <= b:\n    pass\n") == ([" <"], [" <="])
    # With a token for each character, `<` stands in both and the two part at the next one.
    assert marked("a < b", "a <= b", characters) == ([" "], ["="])


def test_a_renamed_variable_is_marked_wherever_it_stands():
    assert marked("total = 0\nreturn total", "count = 0\nreturn count") == (["total", " total"], ["count", " count"])


def test_a_line_left_out_is_marked_and_on_the_other_side_where_they_part():
    correct, wrong = "x = 1\ny = 2\nreturn x", "x = 1\nreturn x"
    assert marked(correct, wrong) == (["y", " =", " 2", "\n"], ["return"])
    assert marked(wrong, correct) == (["return"], ["y", " =", " 2", "\n"])


def test_a_line_left_out_at_the_end():
    """Nothing follows in the wrong text but its end."""
    correct, wrong = words("x = 1\ny = 2\n"), words("x = 1\n")
    end = Encoded([*wrong.ids, -1], [*wrong.spans, (6, 7)])
    _, mask = fault_masks(correct, end, changes("x = 1\ny = 2\n", "x = 1\n"))
    assert mask == [0, 0, 0, 0, 1]


def test_the_parting_token_is_one_that_differs():
    """Tokens that hold a newline and an indentation begin before the change and are the same on both sides."""
    correct, wrong = "a\n  b\n  c", "a\n  c"
    sides = (
        Encoded([1, 2, 3, 2, 4], [(0, 1), (1, 4), (4, 5), (5, 8), (8, 9)]),
        Encoded([1, 2, 4], [(0, 1), (1, 4), (4, 5)]),
    )
    masks = fault_masks(*sides, changes(correct, wrong))
    assert masks[0][2] == 1
    assert masks[1] == [0, 0, 1]


def test_whole_lines():
    assert marked("x = 1\ny = a < b\n", "x = 1\ny = a <= b\n", granularity="line") == (
        ["y", " =", " a", " <", " b", "\n"],
        ["y", " =", " a", " <=", " b", "\n"],
    )


def test_equal_texts_have_no_mark():
    assert marked("a\nb", "a\nb") == ([], [])


@functools.cache
def distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_alignment_is_a_shortest_edit():
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(generator.choice(list("abc"), generator.integers(0, 8))) for _ in range(2))
        found = aligned(a, b)
        made, at = "", 0
        for begin, end, other_begin, other_end in found:
            made += a[at:begin] + b[other_begin:other_end]
            assert len(made) == other_end
            at = end
        assert made + a[at:] == b
        assert sum(max(j - i, m - k) for i, j, k, m in found) == distance(a, b)


def test_mutants_parse_differ_and_change_one_place():
    code = "def f(a, b):\n    x = 'ä'\n    if not a and b < 3:\n        b += 1\n    return a is None or b in x\n"
    found = mutated(code)
    assert {ast.dump(ast.parse(one)) for one in found}.isdisjoint({ast.dump(ast.parse(code))})
    assert len(set(found)) == len(found) == 9
    for expected in (
        "b <= 3",
        "b < 4",
        "not a or b",
        "if a and",
        "b += 2",
        "a is not None",
        "and b in x",
        "b not in x",
    ):
        assert sum(expected in one for one in found) == 1, expected
    assert code.replace("        b += 1\n", "") not in found  # an empty block does not parse
    assert code.replace("    x = 'ä'\n", "") in found


def test_mutations_are_drawn_by_seed_and_leave_the_context_alone():
    context, body = "def f(a):\n    '''1 < 2.'''\n", "    b = 1\n    return a < 2 or a > 3\n"
    first = mutated(body, context, 2, seed=1)
    assert first == mutated(body, context, 2, seed=1)
    assert len(first) == 2
    assert any(mutated(body, context, 2, seed=s) != first for s in range(2, 6))
    for one in mutated(body, context):
        ast.parse(context + one)
    assert mutated("    return (", context) == []
    assert mutated("this is no Python") == []


def test_the_answer_is_replaced_in_every_format():
    assert with_completion({"prompt": "p", "completion": "c"}, "w") == {"prompt": "p", "completion": "w"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        last = with_completion(row, "w")[list(row)[-1]][-1]
        assert last == {"role": "assistant", "content": "w"}


@pytest.mark.parametrize("conversation", [True, False])
def test_a_pair_is_the_two_rows_tokenised_and_marked(conversation):
    tokenizer = tiny_tokenizer()
    row = {"prompt": "a b ", "completion": "c d e"}
    if conversation:
        row = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}]}
    pair = tokenize_pair(row, "c x e", tokenizer)
    for ids, mask, expected in (("input_ids", "fault_mask", "d"), ("wrong_input_ids", "wrong_fault_mask", "x")):
        assert len(pair[ids]) == len(pair[mask])
        assert tokenizer.decode([i for i, mark in zip(pair[ids], pair[mask]) if mark]) == expected
    # one word less: the two part at the end of the turn
    pair = tokenize_pair(row, "c d", tokenizer)
    assert tokenizer.decode([i for i, m in zip(pair["wrong_input_ids"], pair["wrong_fault_mask"]) if m]) == "<|im_end|>"


ROWS = [
    {"prompt": "a b ", "completion": "c d e", "wrong": ["c x e"], "weight": 0.5},
    {"prompt": "f ", "completion": "g h i j", "wrong": ["g h i", "y h i j"], "weight": 2.0},
    {"prompt": "k ", "completion": "l m", "wrong": ["l m"], "weight": 1.0},  # the same
]


def data(**kwargs) -> FaultPairs:
    options = {"tokenizer": tiny_tokenizer(), "batch_size": 2, "shuffle": False, "max_length": 16}
    return FaultPairs(ROWS, **{**options, **kwargs})


def test_pairs_come_in_batches_padded_apart(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        module = data()
        batches = list(module.train_dataloader())
    assert "3 pairs from 3 rows; left out are 1 that do not differ" in caplog.text
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    first = batches[0]
    assert first["wrong_input_ids"].shape == first["wrong_fault_mask"].shape == first["wrong_attention_mask"].shape
    assert first["fault_mask"].shape == first["labels"].shape
    assert first["weight"].tolist() == [0.5, 2.0]
    assert first["fault_mask"].sum(1).tolist() == [1, 1]
    assert not first["fault_mask"][first["labels"] == -100].any()
    tokenizer = module.tokenizer
    picked = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(first["input_ids"], first["fault_mask"])]
    assert picked == ["d", "j"]


def test_packing_keeps_both_sides_together():
    batch = next(iter(data(packing=True, max_length=24, batch_size=1).train_dataloader()))
    assert batch["document_ids"].max() == batch["wrong_document_ids"].max() == 2
    for ids, documents in (("fault_mask", "document_ids"), ("wrong_fault_mask", "wrong_document_ids")):
        assert [int(batch[ids][batch[documents] == i].sum()) for i in range(3)] == [1, 1, 1]
    assert "wrong_attention_mask" not in batch


def test_a_difference_that_is_cut_off_is_no_pair():
    short = FaultPairs(ROWS[:1], tokenizer=tiny_tokenizer(), max_length=3)
    with pytest.raises(ValueError, match=r"none of 1 rows gives a pair.*max_length=3"):
        short.rows("train")


def test_rows_without_a_wrong_answer_are_mutated():
    function = {"prompt": "def f ( ) :\n", "completion": "    a = b\n    c = d\n    return a\n"}
    rows = [function, function, {"prompt": "x ", "completion": "y"}]
    module = FaultPairs(rows, tokenizer=tiny_tokenizer(), mutations=2)
    assert len(module.examples("train")) == 4
    none = FaultPairs(rows, tokenizer=tiny_tokenizer(), mutations=0)
    with pytest.raises(ValueError, match="3 have no 'wrong'"):
        none.examples("train")


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    from lightning_peft.datamodules.fault_pairs import encoded

    with pytest.raises(ValueError, match="Slow does not tell which characters"):
        encoded(Slow(), ROWS[0], [])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"granularity": "word"}, "granularity='word'"),
        ({"mutations": -1}, "mutations=-1"),
        ({"streaming": True}, "stream"),
    ],
)
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        data(**kwargs)


def test_the_standard_librarys_functions_train(tmp_path):
    module = FaultAwareCausalLM(tiny_llama(), tokenizer=tiny_tokenizer(), learning_rate=1e-3)
    pairs = StandardLibraryFaultPairs(max_examples=12, max_length=128, batch_size=4, wrong_column="none")
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=1)
    trainer.fit(module, pairs)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    assert trainer.callback_metrics["train_loss"] > trainer.callback_metrics["train_nll"]
