"""The choice of half the matrices: exact counts by category, on hand-made lists and on real networks."""

from __future__ import annotations

from collections import Counter

import pytest

from lightning_peft.half import choose_half
from lightning_peft.roles import Weight, weights_by_role
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama

ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
FFN = ("ffn.gate", "ffn.up", "ffn.down")


def block(i: int, roles=(*ATTENTION, *FFN), norms: int = 2) -> list[Weight]:
    where = {"block": f"layers.{i}", "index": i, "stack": "decoder"}
    found = [Weight(f"layers.{i}.{role}.weight", role, **where) for role in roles]
    found += [Weight(f"layers.{i}.norm{n}.weight", "norm", **where) for n in range(norms)]
    return found


def llama(blocks: int = 30) -> list[Weight]:
    outside = [Weight("embed.weight", "embedding"), Weight("norm.weight", "norm"), Weight("head.weight", "head")]
    return [*outside, *(weight for i in range(blocks) for weight in block(i))]


def counts(chosen: set[str], weights: list[Weight]) -> tuple[list[Counter], Counter]:
    """Category -> number chosen: of each block, and over the model."""
    per_block: dict[str, Counter] = {str(w.block): Counter() for w in weights if w.block is not None}
    for weight in weights:
        if weight.name in chosen and not weight.is_bias:
            per_block[str(weight.block)][weight.role.split(".")[0]] += 1
    return list(per_block.values()), sum(per_block.values(), Counter())


@pytest.mark.parametrize("seed", range(5))
def test_two_of_four_one_or_two_of_three_one_of_two(seed):
    weights = llama(30)
    blocks, total = counts(choose_half(weights, 0.5, seed, 0), weights)
    assert all(count["attention"] == 2 and count["norm"] == 1 and count["ffn"] in (1, 2) for count in blocks)
    assert sum(count["ffn"] == 2 for count in blocks) == 15  # half of the blocks take two
    assert total == {"attention": 60, "ffn": 45, "norm": 30}


def test_only_weights_of_blocks_are_chosen():
    weights = [
        *llama(4),
        Weight("layers.0.q.lora_A.weight", "adapter", "layers.0", 0, "decoder"),
        Weight("layers.0.mlp.router.weight", "router", "layers.0", 0, "decoder"),
        Weight("layers.0.scale", "other", "layers.0", 0, "decoder"),
    ]
    chosen = choose_half(weights)
    assert all(name.startswith("layers.") for name in chosen)
    assert not {w.name for w in weights if w.role in ("adapter", "router", "other")} & chosen


def test_everything_is_chosen_now_and_then():
    """Over rounds each matrix trains about half of the time: no fixed favourite, no matrix left out."""
    weights = llama(6)
    times = Counter(name for round in range(200) for name in choose_half(weights, 0.5, 0, round))
    block_names = {w.name for w in weights if w.block is not None}
    assert times.keys() == block_names
    assert all(70 <= times[name] <= 130 for name in block_names)  # 200 fair draws: 100, sd 7


def test_the_seed_and_the_round_decide():
    weights = llama(6)
    assert choose_half(weights, 0.5, 3, 1) == choose_half(list(weights), 0.5, 3, 1)
    assert choose_half(weights, 0.5, 3, 1) == choose_half(weights[::-1], 0.5, 3, 1)
    different = {frozenset(choose_half(weights, 0.5, seed, round)) for seed in range(4) for round in range(4)}
    assert len(different) == 16


def test_odd_numbers_are_balanced_over_blocks():
    # fused qkv and out are two matrices, one of them; three FFN matrices and one norm do not halve in a block
    weights = [w for i in range(7) for w in block(i, ("attention.qkv", "attention.o", *FFN), norms=1)]
    blocks, total = counts(choose_half(weights), weights)
    assert all(c["attention"] == 1 and c["ffn"] in (1, 2) and c["norm"] in (0, 1) for c in blocks)
    assert total == {"attention": 7, "ffn": 11, "norm": 4}  # 10.5 and 3.5, rounded up


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.3, 0.4, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
def test_other_fractions_count_exactly(fraction, granularity):
    weights = llama(20)
    blocks, total = counts(choose_half(weights, fraction, 1, 2, granularity), weights)
    sizes = {"attention": 4, "ffn": 3, "norm": 2}
    if granularity == "category":
        assert total == Counter({c: int(fraction * n * 20 + 0.5 + 1e-9) for c, n in sizes.items()})
        for category, n in sizes.items():
            assert {count[category] - int(fraction * n + 1e-9) for count in blocks} <= {0, 1}
    elif granularity == "layer":
        assert sorted(count.total() for count in blocks) == [0] * (20 - round(fraction * 20)) + [9] * round(
            fraction * 20
        )
    else:
        assert total.total() == int(fraction * 180 + 0.5)


def test_granularity_model_is_not_balanced():
    weights = llama(30)
    blocks, _ = counts(choose_half(weights, 0.5, 0, 0, "model"), weights)
    assert len({count["attention"] for count in blocks}) > 1


@pytest.mark.parametrize("network", [tiny_llama(attention_bias=True), tiny_gpt2(), tiny_bert()])
@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
def test_a_bias_follows_its_matrix(network, granularity):
    weights = weights_by_role(network)
    chosen = choose_half(weights, granularity=granularity)
    biases = [w.name for w in weights if w.is_bias and w.block is not None]
    assert biases
    for bias in biases:
        assert (bias in chosen) == (bias.removesuffix("bias") + "weight" in chosen), bias


def test_a_bias_with_another_name_follows_too():
    where = {"block": "layers.0", "index": 0, "stack": "encoder"}
    weights = [
        *(Weight(f"layers.0.attn.{n}.weight", f"attention.{n}", **where) for n in ("q", "k", "v", "o")),
        Weight("layers.0.attn.q_bias", "attention.q", is_bias=True, **where),  # BEiT: no `q_bias` beside a `q_weight`
        Weight("layers.0.mlp.experts.gate_up_proj", "expert.gate_up", **where),
        Weight("layers.0.mlp.experts.gate_up_proj_bias", "expert.gate_up", is_bias=True, **where),
        Weight("layers.0.mlp.experts.down_proj", "expert.down", **where),
        Weight("layers.0.mlp.in_proj_weight", "ffn.up", **where),
        Weight("layers.0.mlp.in_proj_bias", "ffn.up", is_bias=True, **where),
    ]
    pairs = {
        "layers.0.attn.q_bias": "layers.0.attn.q.weight",
        "layers.0.mlp.experts.gate_up_proj_bias": "layers.0.mlp.experts.gate_up_proj",
        "layers.0.mlp.in_proj_bias": "layers.0.mlp.in_proj_weight",
    }
    both = Counter()
    for round in range(20):
        chosen = choose_half(weights, round=round)
        for bias, matrix in pairs.items():
            assert (bias in chosen) == (matrix in chosen)
            both[bias, bias in chosen] += 1
    assert len(both) == 6  # each pair was in and out


def test_real_networks_give_the_paper_s_counts():
    weights = weights_by_role(tiny_llama(layers=4))
    blocks, total = counts(choose_half(weights), weights)
    assert total == {"attention": 8, "ffn": 6, "norm": 4}
    assert all(count["attention"] == 2 and count["norm"] == 1 for count in blocks)
    weights = weights_by_role(tiny_gpt2(layers=4))
    blocks, _ = counts(choose_half(weights), weights)
    assert all(count == {"attention": 1, "ffn": 1, "norm": 1} for count in blocks)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5])
def test_refuses_a_fraction_outside(fraction):
    with pytest.raises(ValueError, match=r"fraction=.*\(0, 1\)"):
        choose_half(llama(2), fraction)


def test_refuses_too_few_matrices_and_names_the_block():
    with pytest.raises(ValueError, match=r"'layers.1' has one matrix of the category 'attention'.*granularity"):
        choose_half([*block(0), *block(1, ("attention.qkv", *FFN))])
    with pytest.raises(ValueError, match=r"'layers.1' has no matrix of the category 'ffn'"):
        choose_half([*block(0), *block(1, ATTENTION)])
    assert choose_half([*block(0), *block(1, ATTENTION)], granularity="layer")


def test_refuses_an_unknown_granularity_and_an_empty_network():
    with pytest.raises(ValueError, match=r"granularity='row'.*category"):
        choose_half(llama(2), granularity="row")
    with pytest.raises(ValueError, match="no matrix in any transformer block"):
        choose_half([Weight("embed.weight", "embedding")])
