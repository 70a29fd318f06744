"""Documents, questions and unrelated text in one batch."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.datamodules import DocumentQuestionData
from tests.tiny import tiny_tokenizer

ROWS = [
    {"document": "the cat sat on the mat", "question": "a b", "answer": "cat"},
    {"document": "yes no", "question": "c", "answer": "yes no"},
    {"document": "dog cat dog", "question": "d e f", "answer": "dog"},
]
TEXTS = [{"text": "one two three four"}, {"text": "red green"}]


def data_of(rows=ROWS, **kwargs) -> DocumentQuestionData:
    options = {"tokenizer": tiny_tokenizer(), "shuffle": False, "batch_size": 2, "unrelated": TEXTS}
    return DocumentQuestionData(rows, **{**options, **kwargs})


def text(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return [tiny_tokenizer().decode(own[kept.bool()]) for own, kept in zip(ids, mask)]


def test_a_batch_has_all_three():
    first, second = data_of().train_dataloader()
    assert text(first["documents"]["input_ids"], first["documents"]["attention_mask"]) == [
        r["document"] for r in ROWS[:2]
    ]
    asked = text(first["input_ids"], first["attention_mask"])
    assert [one.split() for one in asked] == [["a", "b", "cat", "<|im_end|>"], ["c", "yes", "no", "<|im_end|>"]]
    learnt = [tiny_tokenizer().decode(own[own != -100]).split() for own in first["labels"]]
    assert learnt == [["cat", "<|im_end|>"], ["yes", "no", "<|im_end|>"]]
    assert text(first["unrelated"]["input_ids"], first["unrelated"]["attention_mask"]) == [TEXTS[0]["text"]]
    assert text(second["unrelated"]["input_ids"], second["unrelated"]["attention_mask"]) == [TEXTS[0]["text"]]
    two = next(iter(data_of(unrelated_per_batch=2).train_dataloader()))
    assert text(two["unrelated"]["input_ids"], two["unrelated"]["attention_mask"]) == [t["text"] for t in TEXTS]


def test_documents_are_cut_and_unrelated_text_may_be_left_out():
    batch = next(iter(data_of(document_length=3, unrelated=None).train_dataloader()))
    assert text(batch["documents"]["input_ids"], batch["documents"]["attention_mask"]) == ["the cat sat", "yes no"]
    assert "unrelated" not in batch


def test_what_it_needs_is_said():
    with pytest.raises(ValueError, match=r"lack \['document'\]"):
        data_of([{"question": "a", "answer": "b"}]).rows("train")
    with pytest.raises(ValueError, match="lack 'text'"):
        data_of(unrelated=[{"words": "a"}]).rows("train")
    with pytest.raises(ValueError, match="has 1 tokens"):
        data_of([{**ROWS[0], "document": "cat"}]).rows("train")
    with pytest.raises(ValueError, match="leave packing"):
        data_of(packing=True)
    with pytest.raises(ValueError, match="document_length=1"):
        data_of(document_length=1)
