"""Packing: several documents in one row of at most `max_length` tokens, each kept whole and apart from the others."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from lightning_peft.datamodules.chat_template import IGNORED


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row: longest first, each into the fullest row that still holds it.

    Needs at most 11/9 of the fewest possible rows. Deterministic: equal lengths go in order, to the row begun first.

    Args:
        lengths: Tokens of each document.
        capacity: Tokens of a row.

    Returns:
        Rows of document numbers.

    Raises:
        ValueError: A document is empty or longer than a row.

    >>> best_fit_decreasing([3, 6, 2, 4], 8)
    [[1, 2], [3, 0]]
    """
    lengths = [int(length) for length in lengths]
    if not all(0 < length <= capacity for length in lengths):
        wrong = next(i for i, length in enumerate(lengths) if not 0 < length <= capacity)
        raise ValueError(f"document {wrong} has {lengths[wrong]} tokens: a row takes 1 to {capacity}.")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # heaps of the rows with just this much room
    rooms = 0  # bit r is set where by_room[r] has a row: the lowest bit from `length` up is the best fit
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = heappop(by_room[room])
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            heappush(by_room[left], row)
            rooms |= 1 << left
    return rows


def packed_row(documents: Sequence[dict[str, Any]], token_columns: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """One row from documents: their tokens end to end, positions from 0 in each.

    No loss crosses from one document to the next: the first label of each is -100, for it would be predicted from the
    document before. A document's `weight` becomes that of its tokens.

    Args:
        documents: Each with `input_ids` and perhaps `labels` [t] and a scalar `weight`.
        token_columns: Further columns with a value for each token, put end to end like the tokens.

    Returns:
        `input_ids`, `labels`, `position_ids`, `document_ids`, perhaps `weight`, and the token columns, each [sum of t].
    """
    lengths = [len(document["input_ids"]) for document in documents]
    row = {
        "input_ids": np.concatenate([document["input_ids"] for document in documents]),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "document_ids": np.repeat(np.arange(len(documents)), lengths),
    }
    if "labels" in documents[0]:
        labels = [np.asarray(document["labels"]).copy() for document in documents]
        for own in labels:
            own[0] = IGNORED
        row["labels"] = np.concatenate(labels)
    for column in token_columns:
        row[column] = np.concatenate([document[column] for document in documents])
    if "weight" in documents[0]:
        row["weight"] = np.repeat(np.asarray([float(document["weight"]) for document in documents]), lengths)
    return row
