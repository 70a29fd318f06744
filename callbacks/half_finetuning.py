"""Half fine-tuning: in each round a random half of every block's matrices trains (HFT, arXiv 2404.18466, ACL 2025)."""

from __future__ import annotations

from typing import Any

from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.half import GRANULARITIES, choose_half
from lightning_peft.roles import Weight


class HalfFineTuning(WeightSelection):
    """Trains half of the attention matrices, of the feed-forward matrices and of the norms of every block.

    The other half stays as it is, which is fine-tuning with the regulariser that pins it to where it was; a new half is
    drawn each round, so that later stages forget less. Embeddings, output matrix and what stands outside of the blocks
    train as well (the paper's default) unless `train_embeddings` is False; the half counts the blocks' weights only.

    Args:
        granularity: "category" (the paper's best), "layer" (whole blocks) or "model" (matrices anywhere).
        fraction: Share of the blocks' weights that trains, in (0, 1).
        reselect: When a new half is drawn: "stage" (each new `fit`), "epoch" or "never".
        seed: Seed of the draw.
        train_embeddings: Train embeddings and the output matrix too.
        picture: Write a map of what trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: An argument is out of range, or the network has no blocks, or too few matrices in one.
    """

    def __init__(
        self,
        granularity: str = "category",
        fraction: float = 0.5,
        reselect: str = "stage",
        seed: int = 0,
        train_embeddings: bool = True,
        picture: bool = False,
    ) -> None:
        super().__init__(reselect, picture)
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction} must lie in (0, 1): 0 would train nothing, 1 is full fine-tuning.")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r} is not known: use one of {GRANULARITIES}.")
        self.granularity, self.fraction, self.seed = granularity, fraction, seed
        self.train_embeddings = train_embeddings

    def arguments(self) -> dict[str, Any]:
        names = ("granularity", "fraction", "reselect", "seed", "train_embeddings")
        return {name: getattr(self, name) for name in names}

    def candidates(self, weights: list[Weight]) -> set[str]:
        frozen = () if self.train_embeddings else ("embedding", "head")
        return {w.name for w in weights if (w.block is not None and w.role != "adapter") or w.role in frozen}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        chosen = choose_half(weights, self.fraction, self.seed, round, self.granularity)
        # Weights of a block that are of no category (a router, a position table) are not the half's to freeze.
        halved = ("attention", "ffn", "expert", "norm", "adapter")
        free = {w.name for w in weights if w.block is not None and w.role.partition(".")[0] not in halved}
        return chosen | free
