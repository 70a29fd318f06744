"""BitFit: of every weight the bias alone trains (arXiv 2106.10199; a subject of the study of paper 76)."""

from __future__ import annotations

from typing import Any

from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.roles import ROLES, Weight, inner_model


class BitFit(WeightSelection):
    """Trains biases, those of norms included, and a classification head; nothing is added to the network.

    BERT-base has 0.1 M biases, 0.09 % of its weights. Llama-style networks have none and are refused. Adapters, and
    what stands beside the network in a LightningModule, keep the `requires_grad` they had.

    Args:
        roles: Whose biases train, such as ["attention.q", "ffn.up"] (with which the paper has most of the effect); a
            first word such as "ffn" means all of its roles. By default all biases.
        train_head: Train the head whole. By default a task's head, which starts at random, but not an output matrix.
        picture: Write a map of what trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: A role is unknown, or the network has no bias of these roles.
    """

    needs_blocks = False

    def __init__(self, roles: list[str] | None = None, train_head: bool | None = None, picture: bool = False) -> None:
        super().__init__("never", picture)
        for role in roles or ():
            if role not in ROLES and not any(known.startswith(f"{role}.") for known in ROLES):
                raise ValueError(f"roles names {role!r}, which is no role: use some of {', '.join(ROLES)}.")
        self.roles, self.train_head = roles, train_head

    def arguments(self) -> dict[str, Any]:
        return {"roles": self.roles, "train_head": self.train_head}

    def candidates(self, weights: list[Weight]) -> set[str]:
        own = [w for w in weights if w.role not in ("adapter", "beside")]
        if not any(self._is_chosen(w) for w in own):
            has = sorted({w.role for w in own if w.is_bias})
            raise ValueError(
                f"BitFit trains biases{f' of {self.roles}' if self.roles else ''} and this network has "
                + (f"biases of {', '.join(has)} only" if has else "none, as Llama-style networks do")
                + ": use LayerFreezing(train=['norms']) or an adapter by PEFT."
            )
        # What is stored in 4 or 8 bits is frozen as it is.
        parameters = dict(self._module.named_parameters()) if self._module is not None else {}
        return {w.name for w in own if parameters[w.name].is_floating_point()}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        network = None if self._module is None else inner_model(self._module)
        output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
        head = output is None if self.train_head is None else self.train_head
        return {w.name for w in weights if self._is_chosen(w) or (head and w.role == "head")}

    def _is_chosen(self, weight: Weight) -> bool:
        if not weight.is_bias or weight.role in ("adapter", "beside"):
            return False
        return self.roles is None or any(weight.role == r or weight.role.startswith(f"{r}.") for r in self.roles)
