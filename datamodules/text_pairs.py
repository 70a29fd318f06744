"""Pairs of texts for `TextEncoder`: what is looked for, and what should be found."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.collate import collate, collator
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source
from lightning_peft.datamodules.standard_library import check_split, functions_by_split
from lightning_peft.datamodules.tokenized import tokenizer_fingerprint

SIDES = ("query", "document")


class TextPairData(InstructionData):
    """Rows with a query and the document that answers it; the other documents of a batch are its negatives.

    Batches hold `query` and `document`, each with `input_ids` and `attention_mask` [batch, time], and `labels` [batch]:
    0, or -100 for a row that only fills up the last batch of uneven ranks, which is neither learnt nor a negative.

    Args:
        data: As for `InstructionData`.
        query_column: The column of queries.
        document_column: The column of documents.
        query_prefix: What stands before every query, as E5's and BGE's networks want it.
        document_prefix: What stands before every document.
        max_length: Tokens of a text at most; longer ones are cut.
        batch_size: Pairs in a batch, on each rank: of each query's negatives there is one less.
        **kwargs: Further arguments of `InstructionData`; no packing and no streaming.

    Raises:
        ValueError: Rows lack a column, a text is empty, or packing or streaming is asked for.
    """

    def __init__(
        self,
        data: Source,
        query_column: str = "query",
        document_column: str = "document",
        query_prefix: str = "",
        document_prefix: str = "",
        max_length: int = 256,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, max_length=max_length, batch_size=batch_size, **kwargs)
        if self.packing or self.streaming:
            raise ValueError("pairs are neither packed nor streamed: leave packing and streaming off.")
        self.columns = {"query": query_column, "document": document_column}
        self.prefixes = {"query": query_prefix, "document": document_prefix}

    def documents(self, split: str) -> Any:
        rows = self.examples(split)
        missing = sorted(set(self.columns.values()) - set(rows.column_names))
        if missing:
            raise ValueError(
                f"the {split} rows have the columns {sorted(rows.column_names)} and lack {missing}: name yours with "
                "query_column= and document_column=."
            )
        settings: dict[str, Any] = {"columns": self.columns, "prefixes": self.prefixes, "max_length": self.max_length}
        key = f"{rows._fingerprint}:{tokenizer_fingerprint(self.tokenizer)}:{json.dumps(settings, sort_keys=True)}"
        made = rows.map(
            partial(tokenize_pair, tokenizer=self.tokenizer, **settings),
            remove_columns=rows.column_names,
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            num_proc=self.num_proc,
            desc=f"tokenising {split} pairs",
        )
        if not len(made):
            raise ValueError(f"the {split} data has no pair.")
        longest = np.maximum(*(np.asarray(made[f"{side}_length"]) for side in SIDES))
        cut = int((longest > self.max_length).sum())
        rank_zero_info(f"{split} data: {len(made)} pairs, {cut} of them cut to max_length={self.max_length}.")
        return made.remove_columns([f"{side}_length" for side in SIDES])

    def collate_fn(self) -> partial[dict[str, Any]]:
        pad = collator(self.tokenizer).keywords["pad_token_id"]
        return partial(collate_pairs, pad_token_id=pad, pad_to_multiple_of=self.pad_to_multiple_of)


def tokenize_pair(
    row: dict[str, Any], tokenizer: Any, columns: dict[str, str], prefixes: dict[str, str], max_length: int
) -> dict[str, Any]:
    """Both texts of a row as tokens, with the tokenizer's own marks and at most `max_length` long.

    Args:
        row: Holds the texts.
        tokenizer: A transformers tokenizer.
        columns: "query" and "document" -> the column with that text.
        prefixes: "query" and "document" -> what stands before it.
        max_length: Tokens kept.

    Returns:
        `query_tokens` and `document_tokens`, their lengths before the cut, and `labels` [1].
    """
    made: dict[str, Any] = {"labels": [0]}
    for side, column in columns.items():
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a row has {column}={text!r}: every pair needs two texts.")
        text = prefixes[side] + text
        made[f"{side}_length"] = len(tokenizer(text)["input_ids"])
        made[f"{side}_tokens"] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    return made


def collate_pairs(rows: Sequence[dict[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """A batch of tokenised pairs.

    Args:
        rows: Each with `query_tokens`, `document_tokens` and `labels` [1].
        pad_token_id: The id to fill up with.
        pad_to_multiple_of: Lengths are rounded up to this.
    """
    batch: dict[str, Any] = {"labels": torch.tensor([int(row["labels"][0]) for row in rows])}
    for side in SIDES:
        own = [{"input_ids": row[f"{side}_tokens"]} for row in rows]
        batch[side] = collate(own, pad_token_id, pad_to_multiple_of)
    return batch


class StandardLibraryPairs(TextPairData):
    """Docstrings and bodies of Python's standard library: real pairs that are always there, split by module.

    Args:
        max_examples: Training pairs at most, evenly over the library; validation and test keep their proportion.
        max_chars: Characters of a function at most.
        min_chars: Characters of a body at least.
        validation: Fraction of modules (about) held out for validation.
        test: Fraction of modules (about) held out for test.
        **kwargs: Further arguments of `TextPairData`.

    Raises:
        ValueError: Fractions do not leave a training split.
    """

    def __init__(
        self,
        max_examples: int | None = None,
        max_chars: int = 1500,
        min_chars: int = 40,
        validation: float = 0.1,
        test: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(data="the standard library of this Python", validation=None, test=None, **kwargs)
        check_split(validation, test, max_examples)
        self.max_examples, self.max_chars, self.min_chars = max_examples, max_chars, min_chars
        self.fractions = (validation, test)

    def read(self) -> dict[str, Any]:
        import datasets

        query, document = self.columns["query"], self.columns["document"]
        validation, test = self.fractions
        functions = functions_by_split(validation, test, self.max_examples, self.max_chars, self.min_chars)
        splits = {}
        for split, rows in functions.items():
            # By its docstring, not its name, which the body may repeat.
            pairs = [{query: docstring(row["prompt"]), document: row["completion"]} for row in rows]
            splits[split] = datasets.Dataset.from_list([pair for pair in pairs if pair[query]])
        return splits


def docstring(prompt: str) -> str:
    """A function's docstring, on one line, from its source down to it."""
    return " ".join((ast.get_docstring(ast.parse(prompt).body[0]) or "").split())  # type: ignore[arg-type]
