"""Batches: padded on the right, masked by length."""

import pickle

import datasets
import torch

from lightning_peft.datamodules.collate import TokenRows, collate, collator
from lightning_peft.datamodules.packing import packed_row
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex
from tests.tiny import tiny_tokenizer


def plain(batch):
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_rows_of_different_lengths():
    rows = [
        {"input_ids": [4, 5, 4], "labels": [-100, 5, 4], "weight": 2.0, "group": 7, "source": "x"},
        {"input_ids": [6], "labels": [6], "weight": 1.0, "group": 8, "source": "y"},
    ]
    batch = collate(rows, pad_token_id=4)
    assert plain(batch) == {
        "input_ids": [[4, 5, 4], [6, 4, 4]],
        "labels": [[-100, 5, 4], [6, -100, -100]],
        # The pad token is real in the first row: by length, not by token.
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "weight": [2.0, 1.0],
        "group": [7, 8],
        "source": ["x", "y"],
    }
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["weight"].dtype == torch.float32
    assert collate(rows, 4, pad_to_multiple_of=8)["input_ids"].shape == (2, 8)


def test_packed_rows():
    documents = [
        {"input_ids": [5, 6], "labels": [5, 6], "weight": 3.0},
        {"input_ids": [7], "labels": [7], "weight": 1.0},
    ]
    batch = collate([packed_row(documents), packed_row(documents[1:])], pad_token_id=0)
    assert plain(batch) == {
        "input_ids": [[5, 6, 7], [7, 0, 0]],
        "labels": [[-100, 6, -100], [-100, -100, -100]],
        "position_ids": [[0, 1, 0], [0, 0, 0]],
        "document_ids": [[0, 0, 1], [0, -1, -1]],
        "weight": [[3.0, 3.0, 1.0], [1.0, 0.0, 0.0]],
    }


def test_a_repeated_row_counts_for_nothing():
    rows = TokenRows(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [-100, 4]]}))
    assert rows[1]["labels"].tolist() == [-100, 4]
    assert rows[RepeatedIndex(1)]["labels"].tolist() == [-100, -100]
    assert rows[RepeatedIndex(1)]["input_ids"].tolist() == [3, 4]
    packed = TokenRows(rows.dataset, bins=[[1, 0]])
    assert len(packed) == 1
    assert packed[0]["input_ids"].tolist() == [3, 4, 1, 2]
    assert packed[RepeatedIndex(0)]["labels"].tolist() == [-100] * 4


def test_collator_is_picklable_and_knows_the_pad_token():
    batch = pickle.loads(pickle.dumps(collator(tiny_tokenizer(), 2)))([{"input_ids": [9], "labels": [9]}])
    assert batch["input_ids"].tolist() == [[9, 0]]
    unpadded = tiny_tokenizer()
    unpadded.pad_token = None
    assert collator(unpadded)([{"input_ids": [9], "labels": [9]}, {"input_ids": [9, 8], "labels": [9, 8]}])[
        "input_ids"
    ].tolist() == [[9, 4], [9, 8]]
