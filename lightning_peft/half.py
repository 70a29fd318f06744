"""A random half of a transformer's matrices, balanced over categories and blocks (HFT, arXiv 2404.18466)."""

from __future__ import annotations

import math
import random

from lightning_peft.roles import Weight

GRANULARITIES = ("category", "layer", "model")
CATEGORIES = {"attention": "attention", "ffn": "ffn", "expert": "ffn", "norm": "norm"}


def choose_half(
    weights: list[Weight], fraction: float = 0.5, seed: int = 0, round: int = 0, granularity: str = "category"
) -> set[str]:
    """Names of the block weights that train in this round; the counts over the model are exact, not expected.

    "category" (the paper's choice): in every block, of the attention matrices (q, k, v, o: two of four), of the
    feed-forward's (of gate, up, down: one or two, so that over all blocks half of them train) and of the norms (one of
    two), each `fraction` of them; where that is not whole, blocks drawn at random take one more until the model's total
    is right (so of blocks with a single norm, half train it). "layer" chooses whole blocks, "model" matrices anywhere.
    A bias follows its matrix. Adapters, routers and weights outside of blocks are never chosen.

    Args:
        weights: All weights of the network, from `weights_by_role`.
        fraction: Share that trains, in (0, 1).
        seed: Seed; together with `round` it decides everything, so that all ranks choose alike.
        round: Number of the selection.
        granularity: "category", "layer" or "model".

    Raises:
        ValueError: `fraction` or `granularity` is out of range, a block has fewer than two matrices of a category, or
            there are no blocks.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1): 0 would train nothing, 1 is full fine-tuning.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not known: use one of {GRANULARITIES}.")
    generator = random.Random(f"{seed}:{round}:{granularity}")
    units = _units(weights)
    if not units:
        raise ValueError("there is no matrix in any transformer block to choose from.")
    if granularity == "layer":
        blocks = list(dict.fromkeys(weight.block for weight in units))
        kept = set(generator.sample(blocks, math.floor(fraction * len(blocks) + 0.5)))
        chosen = [weight for weight in units if weight.block in kept]
    elif granularity == "model":
        chosen = generator.sample(units, math.floor(fraction * len(units) + 0.5))
    else:
        chosen = []
        for category in ("attention", "ffn", "norm"):
            by_block: dict[str, list[Weight]] = {str(weight.block): [] for weight in units}
            for weight in units:
                if _category(weight) == category:
                    by_block[str(weight.block)].append(weight)
            chosen += _balanced(by_block, category, fraction, generator)
    names = {unit.name for unit in chosen}
    return names | {bias for bias, unit in _biases(weights, units).items() if unit in names}


def _category(weight: Weight) -> str | None:
    return CATEGORIES.get(weight.role.partition(".")[0])


def _units(weights: list[Weight]) -> list[Weight]:
    """What is chosen as one: matrices and norm weights in blocks, without their biases."""
    units = [weight for weight in weights if weight.block is not None and _category(weight) and not weight.is_bias]
    return sorted(units, key=lambda weight: weight.name)  # a file lists the same weights in another order


def _biases(weights: list[Weight], units: list[Weight]) -> dict[str, str]:
    """Bias -> the matrix that it follows: by its name, or (BEiT's `q_bias`) the first of its role in its block."""
    names = {unit.name for unit in units}
    follows = {}
    for bias in weights:
        if not bias.is_bias or bias.block is None or not _category(bias):
            continue
        named = [f"{bias.name[: -len('bias')]}weight", bias.name.removesuffix("_bias")]
        same_role = [unit.name for unit in units if (unit.block, unit.role) == (bias.block, bias.role)]
        same_category = [u.name for u in units if (u.block, _category(u)) == (bias.block, _category(bias))]
        found = [*(name for name in named if name in names), *same_role, *same_category]
        if found:
            follows[bias.name] = found[0]
    return follows


def _balanced(
    by_block: dict[str, list[Weight]], category: str, fraction: float, generator: random.Random
) -> list[Weight]:
    for block, members in by_block.items():
        if len(members) < 2 and category != "norm":
            found = "one matrix" if members else "no matrix"
            raise ValueError(
                f"block {block!r} has {found} of the category {category!r}, and of fewer than two none can be chosen: "
                "use granularity='layer' or 'model' for this network."
            )
    shares = {block: fraction * len(members) for block, members in by_block.items()}
    counts = {block: math.floor(share + 1e-9) for block, share in shares.items()}
    missing = math.floor(sum(shares.values()) + 0.5) - sum(counts.values())
    uneven = [block for block, share in shares.items() if share - counts[block] > 1e-9]
    for block in generator.sample(uneven, min(missing, len(uneven))):
        counts[block] += 1
    return [weight for block, members in by_block.items() for weight in generator.sample(members, counts[block])]
