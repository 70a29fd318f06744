"""Graph-aware attention against a loop over heads, and in a small Llama that is trained from scratch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft.adapters.graph_aware_attention import GraphAwareAttention
from tests.adapters.networks import IDS, filled
from tests.tiny import tiny_llama


def by_head(layer, hidden, h):
    """What head h makes, by modules of its own, in eval mode."""
    d = layer.head_dim
    part = slice(h * d, (h + 1) * d)
    q, k = layer.q_proj(hidden)[..., part], layer.k_proj(hidden)[..., part]
    scores = q @ k.transpose(1, 2) / math.sqrt(d)
    if layer.alpha is not None:
        scores = scores * layer.alpha
    time = hidden.shape[1]
    scores = scores.masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), float("-inf"))
    a = scores.softmax(-1) if layer.weights == "softmax" else scores.relu()
    if layer.aggregation == "gin":
        x = hidden[..., part]
        x = (layer.eps[0, h] * x + a @ x) @ layer.first.weight[h] + layer.first.bias[h]
        x = x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * layer.norm[h]
    else:
        v = layer.v_proj(hidden)[..., part]
        rows = []
        for b in range(len(v)):
            for i in range(time):
                w = a[b, i]
                degree = w.sum() if w.sum() > 0 else torch.ones(())
                mean = (w[:, None] * v[b]).sum(0) / degree
                read = v[b][w > 0]
                largest = read.max(0).values if len(read) else torch.zeros(d)
                variance = ((w[:, None] * v[b] ** 2).sum(0) / degree - mean**2).clamp(min=0)
                rows.append(torch.cat([(w[:, None] * v[b]).sum(0), mean, largest, variance]))
        x = torch.stack(rows).reshape(len(v), time, -1) @ layer.first.weight[h] + layer.first.bias[h]
    return F.silu(x) @ layer.second.weight[h] + layer.second.bias[h]


@pytest.mark.parametrize("aggregation", ["gin", "pna"])
@pytest.mark.parametrize("weights", ["softmax", "relu"])
def test_equal_to_a_loop_over_heads(aggregation, weights):
    torch.manual_seed(0)
    layer = filled(GraphAwareAttention(12, 3, aggregation, weights=weights)).eval()
    hidden = torch.randn(2, 5, 12)
    expected = torch.cat([by_head(layer, hidden, h) for h in range(3)], -1)
    expected = expected if layer.o_proj is None else layer.o_proj(expected)
    made, edges = layer(hidden)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert edges.shape == (2, 3, 5, 5)
    assert (layer.v_proj is None) == (layer.o_proj is None) == (aggregation == "gin")


@pytest.mark.parametrize("aggregation", ["gin", "pna"])
def test_causal_and_with_a_mask(aggregation):
    torch.manual_seed(0)
    layer = filled(GraphAwareAttention(12, 3, aggregation)).eval()
    hidden = torch.randn(1, 6, 12)
    other = hidden.clone()
    other[:, 3] += 1
    difference = (layer(hidden)[0] - layer(other)[0]).abs().amax(-1)[0]
    assert not difference[:3].any()
    assert difference[3:].all()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(6, 6).masked_fill(~allowed[0, 0], torch.finfo(torch.float32).min)[None, None]
    for mask in (allowed, additive):
        torch.testing.assert_close(layer(hidden, attention_mask=mask)[0], layer(hidden)[0])
    loose = GraphAwareAttention(12, 3, causal=False).eval()
    assert (loose(hidden)[0] - loose(other)[0]).abs().amax(-1).all()


def test_alpha_starts_at_one_and_trains():
    layer = GraphAwareAttention(12, 3)
    assert float(layer.alpha) == 1.0
    layer(torch.randn(1, 5, 12))[0].pow(2).sum().backward()
    assert layer.alpha.grad.abs() > 0
    assert GraphAwareAttention(12, 3, sharpening=False).alpha is None


@pytest.mark.parametrize("aggregation", ["gin", "pna"])
def test_a_small_llama_learns_with_it(aggregation):
    torch.manual_seed(0)
    network = tiny_llama(num_key_value_heads=4)
    for layer in network.model.layers:
        layer.self_attn = GraphAwareAttention(32, 4, aggregation, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = network(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None for p in network.parameters())


def test_maxima_row_by_row_are_those_of_all_rows():
    edges, x = torch.rand(1, 2, 70, 70).tril(), torch.randn(1, 2, 70, 3)
    torch.testing.assert_close(GraphAwareAttention.moments(edges, x), GraphAwareAttention.moments(edges, x, rows=70))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aggregation": "gat"}, "aggregation='gat' is not known"),
        ({"weights": "tanh"}, "weights='tanh' is not known"),
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=12"),
        ({"hidden_factor": 0.1}, "hidden_factor=0.1 leaves nothing"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        GraphAwareAttention(**{"hidden_size": 12, "num_heads": 3, **given})


def test_a_cache_is_refused():
    with pytest.raises(ValueError, match="takes no cache"):
        GraphAwareAttention(12, 3)(torch.randn(1, 5, 12), cache=nn.Identity())
