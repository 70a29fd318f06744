"""What the conformance runs learn from: a few rows of random numbers whose units differ in size from row to row."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from lightning_peft.datamodules import ClassPairs, ClassPairSampler, LookAheadDataLoader, TraceSetCollator
from tests.tiny import VOCABULARY, tiny_tokenizer

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
    """Row `number` of a kind (see `Rows`)."""
    if kind in ("images", "image_pairs"):
        # Every class in each 3 rows; 1 of 7 is not learnt.
        return {
            "pixel_values": torch.randn(1, 8, 8, generator=generator) + number % 3,
            "labels": torch.tensor(-100 if number % 7 == 6 else number % 3),
        }
    if kind == "traces":  # a question with two, each behind a tag
        traces = [token_row(generator, number + other) for other in (0, 2)]
        for trace in traces:
            begin = max(int((trace["labels"] != -100).nonzero()[0]), 2)
            trace["labels"][:begin] = -100
            trace["input_ids"][begin - 1] = tiny_tokenizer().convert_tokens_to_ids("red")
        kept = ("input_ids", "labels")
        return {"question_id": number, "traces": [{name: trace[name] for name in kept} for trace in traces]}
    row = token_row(generator, number)
    if kind == "documents":  # questions about them, and unrelated text
        return {**row, "document": token_row(generator, 0), "unrelated": token_row(generator, 1)}
    if kind == "faults":  # every fourth row has no fault
        places = torch.arange(TIME)
        mask = (places % 3 == number % 3) & (row["labels"] != -100) & (number % 4 > 0)
        wrong = torch.where(mask, (row["input_ids"] + 7) % VOCABULARY, row["input_ids"])
        further = {"fault_mask": mask.long(), "wrong_fault_mask": mask.long(), "wrong_input_ids": wrong}
        return {**row, **further, "wrong_attention_mask": row["attention_mask"]}
    if kind == "reasoning":  # every fifth row has no reasoning
        return {**row, "reasoning_mask": ((row["input_ids"] % 3 == 0) & (number % 5 > 0)).long()}
    if kind == "classes":
        return {**row, "labels": torch.tensor(-100 if number % 7 == 6 else number % 2)}
    if kind == "pairs":
        other = token_row(generator, number + 1)
        return {"query": without_labels(row), "document": without_labels(other)}
    return row


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "labels"}


def documents_and_questions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of "documents"."""
    batch = default_collate(rows)
    documents, unrelated = (without_labels(batch.pop(name)) for name in ("document", "unrelated"))
    return {**batch, "documents": documents, "unrelated": unrelated}


def image_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Grey images of 8 x 8 pixels as nested lists, of 3 classes."""
    generator = torch.Generator().manual_seed(start)
    images = torch.randint(0, 128, (n, 8, 8), generator=generator)
    return [{"image": (image + 40 * (i % 3)).tolist(), "label": i % 3} for i, image in enumerate(images)]


def wrong_text_rows(n: int, start: int = 0) -> list[dict[str, str]]:
    """`text_rows` with a wrong completion beside each."""
    return [{**row, "wrong": f"{row['completion']} maybe"} for row in text_rows(n, start)]


def text_rows(n: int, start: int = 0) -> list[dict[str, str]]:
    """Prompts and completions in the words of the tiny tokenizer, completions of 1 to 6 words."""
    return [
        {
            "prompt": f"{WORDS[i % 36]} {WORDS[i * 7 % 36]} ",
            "completion": " ".join(WORDS[i % 5 : i % 5 + i * 5 % 6 + 1]),
        }
        for i in range(start, start + n)
    ]


def trace_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Questions with one to three traces."""
    rows = text_rows(3 * n, start)
    return [
        {"prompt": row["prompt"], "traces": [other["completion"] for other in rows[3 * i : 3 * i + 1 + i % 3]]}
        for i, row in enumerate(rows[::3])
    ]


def document_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Documents with a question each."""
    rows = text_rows(n, start)
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    return [{"question": q, "answer": a, "document": f"{q} {a} yes no"} for q, a in pairs]


def pair_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Queries with their documents."""
    return [{"query": row["prompt"], "document": row["completion"]} for row in text_rows(n, start)]


def edit_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Facts to be edited."""
    return [{"prompt": row["prompt"], "target_new": row["completion"].strip()} for row in text_rows(n, start)]


#: Rows for data modules, by the registry's name of the kind.
TEXTS = {
    "text": text_rows,
    "wrong_text": wrong_text_rows,
    "trace_text": trace_rows,
    "document_text": document_rows,
    "pair_text": pair_rows,
    "edit_text": edit_rows,
}


class Rows(L.LightningDataModule):
    """Three optimizer steps of 12 rows an epoch, however these are dealt to micro-batches and ranks.

    Args:
        kind: "tokens", "faults" and "reasoning" (tokens with what papers 94 and 104 want), "classes", "pairs",
            "images", "image_pairs" (of classes, to be mixed), "traces" (a row is a question with several) or
            "documents" (with questions about them).
        batch_size: Rows in a batch, on each rank.
        rows: Training rows.
        plain: A plain `DataLoader`, as somebody has who imports nothing of ours; else ours, shuffled.
    """

    def __init__(self, kind: str = "tokens", batch_size: int = 12, rows: int = 36, plain: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [make_row(kind, generator, number) for number in range(rows + 6)]
        self.train, self.held_out = made[:rows], made[rows:]
        self.kind, self.batch_size, self.plain = kind, batch_size, plain
        self.collate_fn: Any = {"traces": TraceSetCollator(), "documents": documents_and_questions}.get(kind)

    def train_dataloader(self) -> DataLoader:
        if self.plain:
            # Lightning would deal training rows to ranks in another order than one process sees them.
            sampler = DistributedSampler(self.train, shuffle=False) if dist.is_initialized() else None
            return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)
        if self.kind == "image_pairs":
            sampler = ClassPairSampler([int(row["labels"]) for row in self.train])
            return LookAheadDataLoader(ClassPairs(self.train), batch_size=self.batch_size, sampler=sampler)
        return LookAheadDataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=self.collate_fn)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=3, collate_fn=self.collate_fn)

    test_dataloader = predict_dataloader = val_dataloader
