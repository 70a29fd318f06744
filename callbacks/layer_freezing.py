"""Freezing by role: embeddings and head, the last block, and whatever else is named (arXiv 2208.13928, paper 118).

The paper personalises code models in four ways: all weights ("custom"), embeddings and output matrix alone ("L-EO"),
the last decoder block alone ("L-LDB"), and a prefix (PEFT's). The second is `train=["embeddings", "head"]`, the third
`train=["last_block"]`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.roles import ROLES, Weight, has_tied_head

#: Names of several roles at once, and their plurals.
GROUPS = {"embeddings": "embedding", "norms": "norm", "biases": "bias", "routers": "router", "experts": "expert"}
_BLOCK = re.compile(r"(?:(encoder|decoder)\.)?block:(-?\d+)")


class LayerFreezing(WeightSelection):
    """Trains what is named and freezes the rest of the network, on any LightningModule.

    Lightning's `BackboneFinetuning` freezes one attribute called `backbone` and thaws all of it after some epochs; this
    one knows what a weight is for. What stands beside the network in a LightningModule, and adapters, keep the
    `requires_grad` they had.

    Args:
        train: What trains, each entry one of: a role or the first word of roles, such as "embeddings", "head", "norms",
            "attention", "attention.q", "ffn", "expert", "router", "biases"; "block:N" (from 0, negative from the end;
            of an encoder-decoder the decoder's, or "encoder.block:N"); "last_block", which is "block:-1"; or the name
            of one of the network's modules or weights.
        picture: Write a map of what trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: `train` is empty, an entry names nothing in this network (closest names are told), or a tied head
            or embedding is named without the other.
    """

    needs_blocks = False

    def __init__(self, train: list[str] | tuple[str, ...] = ("last_block",), picture: bool = False) -> None:
        super().__init__("never", picture)
        if isinstance(train, str) or not train:
            raise ValueError(f"train={train!r} must be a list of what trains, such as ['embeddings', 'head'].")
        self.train = tuple(train)

    def arguments(self) -> dict[str, Any]:
        return {"train": list(self.train)}

    def candidates(self, weights: list[Weight]) -> set[str]:
        own = [w for w in weights if w.role not in ("adapter", "beside")]
        chosen = self.chosen(own)
        # What is stored in 4 or 8 bits is frozen as it is; to train it is refused.
        parameters = dict(self._module.named_parameters()) if self._module is not None else {}
        return {w.name for w in own if w.name in chosen or parameters[w.name].is_floating_point()}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        return self.chosen([w for w in weights if w.role not in ("adapter", "beside")])

    def chosen(self, weights: list[Weight]) -> set[str]:
        """Names of the weights that `train` names."""
        self._check_tie()
        names: set[str] = set()
        for entry in self.train:
            if has_tied_head(self._module) and entry == "head":
                continue  # it is the embedding, which is named too
            names |= named_weights(entry, weights, "LayerFreezing: train")
        return names

    def _check_tie(self) -> None:
        named = {GROUPS.get(entry, entry) for entry in self.train} & {"embedding", "head"}
        if len(named) == 1 and has_tied_head(self._module):
            other = "head" if named == {"embedding"} else "embeddings"
            raise ValueError(
                f"LayerFreezing(train={list(self.train)}): this network's output matrix is its embedding (tied), so "
                f"the two train together: add {other!r}, or load the network with tie_word_embeddings=False."
            )


def named_weights(entry: str, weights: list[Weight], argument: str) -> set[str]:
    """Names of the weights that `entry` means, as for `LayerFreezing`.

    Args:
        entry: A role, a block or a module.
        weights: Those of the network.
        argument: Who asks, for the message.

    Raises:
        ValueError: There are none; the message tells what there is.
    """
    belongs = _predicate(entry, weights)
    found = {w.name for w in weights if belongs is not None and belongs(w)}
    if not found:
        raise ValueError(_unknown(entry, weights, argument))
    return found


def _predicate(entry: str, weights: list[Weight]) -> Callable[[Weight], bool] | None:
    """Whether a weight belongs to what `entry` names; `None` for a block that there is not."""
    block = _BLOCK.fullmatch("block:-1" if entry == "last_block" else entry)
    if block:
        stack, number = block.group(1), int(block.group(2))
        stacks = {w.stack for w in weights if w.block is not None}
        if stack is None and stacks >= {"encoder", "decoder"}:
            stack = "decoder"
        inside = [w for w in weights if w.index is not None and stack in (None, w.stack)]
        count = 1 + max((w.index or 0 for w in inside), default=-1)
        if not -count <= number < count:
            return None
        names = {w.name for w in inside if w.index == number % count}
        return lambda w: w.name in names
    role = GROUPS.get(entry, entry)
    if role == "bias":
        return lambda w: w.is_bias
    if role in ROLES or any(known.startswith(f"{role}.") for known in ROLES):
        return lambda w: w.role == role or w.role.startswith(f"{role}.")
    # A module's or weight's name, as the LightningModule or the network in it has it.
    return lambda w: re.search(rf"(^|\.){re.escape(entry)}(\.|$)", w.name) is not None


def _unknown(entry: str, weights: list[Weight], argument: str) -> str:
    plurals = {role: name for name, role in GROUPS.items()}
    roles = {w.role for w in weights}
    known = sorted(
        {plurals.get(role, role) for role in roles} | {role.partition(".")[0] for role in roles if "." in role}
    )
    known += ["biases"] if any(w.is_bias for w in weights) else []
    counts = {w.stack: 1 + max(v.index or 0 for v in weights if v.stack == w.stack) for w in weights if w.block}
    blocks = [f"{stack + '.' if len(counts) > 1 and stack else ''}block:0 to {n - 1}" for stack, n in counts.items()]
    modules = set()
    for parts in (w.name.split(".")[:-1] for w in weights):
        modules |= {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    close = difflib.get_close_matches(entry, [*known, *GROUPS, "last_block", *sorted(modules)], n=3)
    return (
        f"{argument} names {entry!r}, which nothing in this network is"
        + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
        + f". It has {', '.join(known)}"
        + (f"; {', '.join(blocks)}" if blocks else "; no transformer blocks")
        + ". A module's name, such as 'layers.3.mlp', will do too."
    )
