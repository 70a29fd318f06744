"""Documents with questions about them, and unrelated text (for `MetaTokenWeighting`, paper 81)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.datamodules.collate import collator
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source, read_rows

DOCUMENT, UNRELATED = "document_tokens", "unrelated_tokens"


def padded_text(texts: Sequence[Any], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [batch, time] of token ids of different lengths, padded on the right."""
    time = max(len(ids) for ids in texts)
    ids = torch.full((len(texts), time), pad_token_id)
    for row, own in enumerate(texts):
        ids[row, : len(own)] = torch.as_tensor(own)
    mask = torch.arange(time)[None] < torch.tensor([len(own) for own in texts])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


class DocumentQuestionCollator:
    """A batch of questions with answers, with `documents` and `unrelated` as dictionaries of ids and mask.

    Args:
        collate_fn: From tokenised questions to a batch.
        pad_token_id: The id that texts are padded with.
        unrelated: Unrelated texts in a batch.
    """

    def __init__(
        self, collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]], pad_token_id: int, unrelated: int
    ) -> None:
        self.collate_fn, self.pad_token_id, self.unrelated = collate_fn, pad_token_id, unrelated

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        questions = [{k: v for k, v in row.items() if k not in (DOCUMENT, UNRELATED)} for row in rows]
        batch = self.collate_fn(questions)
        batch["documents"] = padded_text([row[DOCUMENT] for row in rows], self.pad_token_id)
        if UNRELATED in rows[0]:
            texts = [row[UNRELATED] for row in rows[: self.unrelated]]
            batch["unrelated"] = padded_text(texts, self.pad_token_id)
        return batch


class DocumentQuestionData(InstructionData):
    """Rows with a `document`, a `question` and its `answer`; the answer and the end-of-text token are learnt.

    Args:
        data: As for `InstructionData`.
        unrelated: Texts of another kind, of which the adapted network should think as before: a source with `text`.
            Each row brings one of them, and the first of a batch are used.
        unrelated_per_batch: How many of a batch are used.
        document_length: Tokens of a document (or unrelated text) at most; the rest is cut off.
        separator: What stands between question and answer.
        batch_size: Documents in a batch, on each rank; equal to `meta_documents` of the module.
        **kwargs: Further arguments of `InstructionData`; no packing and no streaming.

    Raises:
        ValueError: Rows lack a column, there is no unrelated text, or packing or streaming is asked for.
    """

    def __init__(
        self,
        data: Source,
        unrelated: Source | None = None,
        unrelated_per_batch: int = 1,
        document_length: int = 1024,
        separator: str = " ",
        batch_size: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, batch_size=batch_size, **kwargs)
        if self.packing or self.streaming:
            raise ValueError("documents are adapted to one by one: leave packing and streaming off.")
        if document_length < 2 or unrelated_per_batch < 1:
            raise ValueError(
                f"document_length={document_length} must be at least 2 and unrelated_per_batch={unrelated_per_batch} "
                "at least 1."
            )
        self.unrelated, self.unrelated_per_batch = unrelated, unrelated_per_batch
        self.document_length, self.separator = document_length, separator
        columns = (DOCUMENT,) if unrelated is None else (DOCUMENT, UNRELATED)
        self.row_options |= {"completion_only_loss": True, "keep_columns": columns}

    def examples(self, split: str) -> Any:
        rows = super().examples(split)
        missing = [name for name in ("document", "question", "answer") if name not in rows.column_names]
        if missing:
            raise ValueError(f"rows have the columns {rows.column_names} and lack {missing}.")
        texts = None if self.unrelated is None else read_rows(self.unrelated)
        if texts is not None and "text" not in texts.column_names:
            raise ValueError(f"unrelated rows have the columns {texts.column_names} and lack 'text'.")
        tokens = [] if texts is None else [self._tokens(row["text"]) for row in texts]

        def made(row: dict[str, Any], number: int) -> dict[str, Any]:
            out = {
                "prompt": row["question"] + self.separator,
                "completion": row["answer"],
                DOCUMENT: self._tokens(row["document"]),
            }
            return {**out, UNRELATED: tokens[number % len(tokens)]} if tokens else out

        return rows.map(made, with_indices=True, remove_columns=rows.column_names)

    def _tokens(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])[: self.document_length]
        if len(ids) < 2:
            raise ValueError(f"the text {text[:40]!r} has {len(ids)} tokens: there is nothing to predict in it.")
        return ids

    def collate_fn(self) -> DocumentQuestionCollator:
        own: Any = super().collate_fn()
        return DocumentQuestionCollator(
            own, collator(self.tokenizer).keywords["pad_token_id"], self.unrelated_per_batch
        )
