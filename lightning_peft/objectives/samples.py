"""Which example each token belongs to: a row of the batch, or a document of a packed row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch


def sample_of(batch: Batch, index: Tensor, most: int | None = None) -> tuple[Tensor, int]:
    """The example of each token, as a number below the returned bound; not every number need be taken.

    Args:
        batch: With `labels` [batch, time], and `document_ids` [batch, time] if rows are packed.
        index: Flat positions in `labels`, [n].
        most: Documents in a row at most; by default as many as it has positions. Give it where the numbers of two
            batches are to agree.

    Returns:
        Numbers [n] and their bound.
    """
    rows, time = batch["labels"].shape
    documents = batch.get("document_ids")
    if documents is None:
        return index // time, rows
    most = time if most is None else most
    return index // time * most + documents.flatten()[index], rows * most


def group_sums(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the values in each group and how many there are, both [groups], in the dtype of `values`.

    Args:
        values: [n].
        group: Group of each value, [n].
        groups: Number of groups.
    """
    empty = torch.zeros(groups, dtype=values.dtype, device=values.device)
    return empty.index_add(0, group, values), empty.index_add(0, group, torch.ones_like(values))
