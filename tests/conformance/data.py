"""What the conformance runs learn from: a few rows of random numbers whose units differ in size from row to row."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lightning_peft.datamodules import LookAheadDataLoader
from tests.tiny import VOCABULARY

TIME = 10
WORDS = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "i",
    "j",
    "k",
    "l",
    "m",
    "n",
    "o",
    "p",
    "q",
    "r",
    "s",
    "t",
    "u",
    "v",
    "w",
    "x",
    "y",
    "z",
    "yes",
    "no",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "red",
    "green",
]


def token_row(generator: torch.Generator, number: int) -> dict[str, Any]:
    """Between 1 and 9 labels to predict, and padding in every third row: a mean of means would show."""
    ids = torch.randint(5, VOCABULARY, (TIME,), generator=generator)
    mask = torch.ones(TIME, dtype=torch.long)
    labels = ids.clone()
    labels[: (number * 5) % (TIME - 3)] = -100
    if number % 3 == 2:
        ids[-2:], mask[-2:], labels[-2:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_row(kind: str, generator: torch.Generator, number: int) -> dict[str, Any]:
    """Row `number` of a kind: "tokens", "classes" or "pairs"."""
    row = token_row(generator, number)
    if kind == "classes":
        return {**row, "labels": torch.tensor(-100 if number % 7 == 6 else number % 2)}
    if kind == "pairs":
        other = token_row(generator, number + 1)
        return {"query": without_labels(row), "document": without_labels(other)}
    return row


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "labels"}


def text_rows(n: int, start: int = 0) -> list[dict[str, str]]:
    """Prompts and completions in the words of the tiny tokenizer, completions of 1 to 6 words."""
    return [
        {
            "prompt": f"{WORDS[i % 36]} {WORDS[i * 7 % 36]} ",
            "completion": " ".join(WORDS[i % 5 : i % 5 + i * 5 % 6 + 1]),
        }
        for i in range(start, start + n)
    ]


class Rows(L.LightningDataModule):
    """Three optimizer steps of 12 rows an epoch, however these are dealt to micro-batches and ranks.

    Args:
        kind: "tokens", "classes" or "pairs".
        batch_size: Rows in a batch, on each rank.
        rows: Training rows.
        plain: A plain `DataLoader`, as somebody has who imports nothing of ours; else ours, shuffled.
    """

    def __init__(self, kind: str = "tokens", batch_size: int = 12, rows: int = 36, plain: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [make_row(kind, generator, number) for number in range(rows + 6)]
        self.train, self.held_out = made[:rows], made[rows:]
        self.batch_size, self.plain = batch_size, plain

    def train_dataloader(self) -> DataLoader:
        if self.plain:
            return DataLoader(self.train, batch_size=self.batch_size)
        return LookAheadDataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=3)

    test_dataloader = predict_dataloader = val_dataloader
