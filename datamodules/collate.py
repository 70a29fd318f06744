"""From tokenised rows to batches: padding on the right, masked by length and never by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.datamodules.chat_template import IGNORED
from lightning_peft.datamodules.packing import packed_row
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex

_PADDING = {"labels": IGNORED, "document_ids": -1, "position_ids": 0, "weight": 0.0}


class TokenRows(Dataset):
    """Tokenised rows as a map-style data set, packed or one document each.

    A `RepeatedIndex` (a row that stands twice in an epoch) comes with every label masked.

    Args:
        dataset: Documents with `input_ids`, `labels` and perhaps `weight` and further columns.
        bins: Which documents share a row; by default each has its own.
        token_columns: Further columns with a value for each token.
    """

    def __init__(self, dataset: Any, bins: list[list[int]] | None = None, token_columns: Sequence[str] = ()) -> None:
        self.dataset = dataset.with_format("numpy")
        self.bins, self.token_columns = bins, tuple(token_columns)

    def __len__(self) -> int:
        return len(self.dataset) if self.bins is None else len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.bins is None:
            row = dict(self.dataset[int(index)])
        else:
            row = packed_row([self.dataset[document] for document in self.bins[index]], self.token_columns)
        if isinstance(index, RepeatedIndex):
            row["labels"] = np.full_like(row["labels"], IGNORED)
        return row


def collate(
    rows: Sequence[dict[str, Any]],
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
    token_columns: Sequence[str] = (),
) -> dict[str, Any]:
    """A batch of rows of different lengths.

    Args:
        rows: Each with `input_ids` and `labels` [t]; packed ones with `document_ids` and `position_ids` [t] too.
        pad_token_id: The id to fill up `input_ids` with; it may be that of a real token.
        pad_to_multiple_of: The batch's length is the longest row's, rounded up to this.
        token_columns: Further columns with a value (or as many as the last axis has) for each token.

    Returns:
        `input_ids` and `labels` [batch, time], labels not shifted and -100 in the padding. Plain rows have an
        `attention_mask` [batch, time], 1 over the row's own length. Packed rows have `document_ids` (-1 in the padding)
        and `position_ids` [batch, time] instead, for `packed_attention_mask`: a 2-D mask would let documents see each
        other. `weight` is [batch], of packed rows [batch, time]. Token columns are [batch, time] (or one axis
        more), 0 in the padding. Other columns are tensors [batch] where they are numbers and lists otherwise.

    Raises:
        ValueError: A token column is not as long as its row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    time = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of
    packed = "document_ids" in rows[0]
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in ("input_ids", "labels", "document_ids", "position_ids") or (name == "weight" and packed):
            batch[name] = _padded(values, time, pad_token_id if name == "input_ids" else _PADDING[name])
        elif name in token_columns:
            for value, length in zip(values, lengths):
                if len(value) != length:
                    raise ValueError(f"{name} has {len(value)} values in a row of {length} tokens: it needs one each.")
            fraction = any(np.asarray(value).dtype.kind == "f" for value in values)
            batch[name] = _padded(values, time, 0.0 if fraction else 0)
        elif all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
            column = torch.as_tensor(np.asarray(values))
            batch[name] = column.float() if column.is_floating_point() or name == "weight" else column
        else:
            batch[name] = values
    if not packed:
        mask = torch.arange(time)[None] < torch.tensor(lengths)[:, None]
        batch["attention_mask"] = mask.long()
    return batch


def collator(tokenizer: Any, pad_to_multiple_of: int = 1, token_columns: Sequence[str] = ()) -> partial[dict[str, Any]]:
    """`collate` for a tokenizer; picklable, for workers."""
    pad = tokenizer.pad_token_id
    # Padding is masked by length, so any id will do where a tokenizer has none to offer.
    pad = tokenizer.eos_token_id if pad is None else pad
    return partial(
        collate,
        pad_token_id=0 if pad is None else pad,
        pad_to_multiple_of=pad_to_multiple_of,
        token_columns=tuple(token_columns),
    )


def _padded(rows: list[Any], time: int, fill: float) -> Tensor:
    shape = (len(rows), time, *np.shape(rows[0])[1:])
    out = np.full(shape, fill, dtype=np.float32 if isinstance(fill, float) else np.int64)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return torch.from_numpy(out)
