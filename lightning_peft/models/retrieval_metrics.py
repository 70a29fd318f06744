"""Where the right document stands among all documents of a validation set: MRR@k and recall@k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

CHUNK = 1024  # queries compared with all documents at once


class RetrievalRank(Metric):
    """Ranks of each query's own document by inner product, over all batches and ranks.

    `mrr` is the mean of 1 / rank where the rank is at most `k`, else 0; `recall` is the share of ranks of at most `k`.
    Documents that score the same count as better, so that vectors which are all alike find nothing.

    Args:
        measure: "mrr" or "recall".
        k: How many of the best documents are looked at.

    Raises:
        ValueError: `measure` is unknown or `k` is below 1.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, measure: str = "mrr", k: int = 10) -> None:
        if measure not in ("mrr", "recall"):
            raise ValueError(f"measure={measure!r} is not known: use 'mrr' or 'recall'.")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        super().__init__()
        self.measure, self.k = measure, k
        self.add_state("queries", default=[], dist_reduce_fx="cat")
        self.add_state("documents", default=[], dist_reduce_fx="cat")

    def update(self, queries: Tensor, documents: Tensor) -> None:
        """Adds vectors [n, width]; row i of the one belongs to row i of the other."""
        self.queries: Any
        self.documents: Any
        self.queries.append(queries.detach())
        self.documents.append(documents.detach())

    def compute(self) -> Tensor:
        ranks = ranks_of(dim_zero_cat(self.queries), dim_zero_cat(self.documents))
        found = ranks <= self.k
        return (found / ranks if self.measure == "mrr" else found.float()).mean()


def ranks_of(queries: Tensor, documents: Tensor) -> Tensor:
    """Rank [n], from 1, of document i for query i among all documents [n, width]."""
    ranks = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ documents.T
        own = scores.diagonal(offset=start)
        ranks.append((scores >= own[:, None]).sum(1))
    return torch.cat(ranks)
