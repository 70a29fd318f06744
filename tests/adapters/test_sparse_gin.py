"""Sparse GIN: edge by edge, never from the future, sparse and dense alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_peft.adapters.sparse_gin import SparseGIN, SparseGINConfig, linear_scale, neighbours, sharpened
from lightning_peft.callbacks.peft import PEFT
from tests.adapted import Foreign, fit
from tests.adapters.networks import FAMILIES, IDS, adapted, answer, base, check_round_trips, filled, trained

FORMS = {
    "sum": {},
    "mean": {"combine": "mean"},
    "learned": {"combine": "learned", "keep_above": 0.2},
    "per-head": {"per_head": True},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_round_trips(family, form, tmp_path):
    check_round_trips(family, SparseGINConfig(hidden=6, **FORMS[form]), tmp_path)


def attention(heads=4, time=9, seed=0, causal=True, dtype=torch.float64):
    """Probabilities as softmax gives them, [2, heads, time, time]."""
    scores = 3 * torch.randn(2, heads, time, time, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if causal:
        scores = scores.masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1)


def test_edges_of_one_row_by_hand():
    """sigmoid(10 (A - 0.1)), what is at most 0.6 goes, so raw attention above about 0.14 stays."""
    row = torch.tensor([[0.0, 0.1, 0.14, 0.15, 1.0]]).expand(5, 5)
    edges = sharpened(row, 10.0, 0.1, 0.6, causal=False)[0]
    expected = [0.0, 0.0, 0.0, torch.sigmoid(torch.tensor(0.5)).item(), torch.sigmoid(torch.tensor(9.0)).item()]
    torch.testing.assert_close(edges, torch.tensor(expected))
    assert torch.equal(sharpened(row, 10.0, 0.1, 0.6, causal=True), sharpened(row, 10.0, 0.1, 0.6, False).tril())


@pytest.mark.parametrize("per_head", [False, True])
def test_equal_to_a_computation_edge_by_edge(per_head):
    """Loops over rows, tokens and edges in float64."""
    torch.manual_seed(0)
    config = SparseGINConfig(hidden=5, per_head=per_head, dropout=0.0)
    graph = filled(SparseGIN(8, 4, config, 0.3, causal=True).double())
    probabilities = attention()
    hidden = torch.randn(2, 9, 8, dtype=torch.float64)
    made = graph(hidden, probabilities)

    def prelu(x):
        return torch.where(x > 0, x, graph.activation.weight * x)

    groups = 4 if per_head else 1
    width = 8 // groups
    expected = torch.zeros_like(hidden)
    for b in range(2):
        for n in range(groups):
            raw = probabilities[b, n] if per_head else probabilities[b].sum(0).clamp(max=1)
            h = hidden[b, :, n * width : (n + 1) * width]
            x = h @ graph.inward.weight[n] + graph.inward.bias[n]
            for i in range(9):
                m = graph.eps[n] * x[i]
                for j in range(i + 1):  # a row gathers from itself and what came before
                    edge = torch.sigmoid(10 * (raw[i, j] - 0.1))
                    if edge > 0.6:
                        m = m + edge * x[j]
                u = m + prelu(m @ graph.first.weight[n] + graph.first.bias[n, 0]) @ graph.second.weight[n]
                u = u + graph.second.bias[n, 0]
                g = prelu(u) @ graph.outward.weight[n] + graph.outward.bias[n, 0]
                expected[b, i, n * width : (n + 1) * width] = g
    if not per_head:
        rms = expected.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        expected = expected * rms * graph.norm.weight
    torch.testing.assert_close(made, graph.scale * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "thresholds", [{}, {"threshold": -1.0, "keep_above": 0.0}, {"combine": "learned", "keep_above": 0.0}]
)
def test_no_token_reads_a_later_one_and_later_ones_read_earlier(family, thresholds):
    network = filled(adapted(family, SparseGINConfig(hidden=6, **thresholds)))
    changed = IDS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 100 + 5
    with torch.no_grad():
        difference = (network(input_ids=IDS)[0] - network(input_ids=changed)[0]).abs().amax(-1)
    assert not difference[:, :4].any(), "the future leaks"
    assert difference[:, 4:].all()


def test_a_past_token_changes_a_later_one_through_the_graph_alone():
    """What the published code's edge direction rules out: the GIN's own output moves with an earlier token's state."""
    torch.manual_seed(0)
    graph = filled(SparseGIN(8, 2, SparseGINConfig(hidden=5, keep_above=0.0, threshold=0.0), 1.0, True)).eval()
    hidden = torch.randn(1, 6, 8)
    moved = hidden.clone()
    moved[:, 2] += 1
    probabilities = attention(2, 6, dtype=torch.float32)[:1]
    difference = (graph(hidden, probabilities) - graph(moved, probabilities)).abs().amax(-1)[0]
    assert not difference[:2].any()
    assert difference[2:].all()


def test_padding_is_no_neighbour():
    network = filled(adapted("bert", SparseGINConfig(hidden=6, threshold=-1.0, keep_above=0.0)))
    mask = torch.ones_like(IDS)
    mask[:, 5:] = 0
    other = IDS.clone()
    other[:, 5:] = 9
    with torch.no_grad():
        torch.testing.assert_close(
            network(input_ids=IDS, attention_mask=mask)[0], network(input_ids=other, attention_mask=mask)[0]
        )


def test_it_reads_the_stream_after_the_attention():
    """h is the residual and the attention together, and lambda g goes onto both: by hand on a plain Llama."""
    network = filled(adapted("llama", SparseGINConfig(hidden=6, dropout=0.0)))
    plain = base("llama")
    plain.set_attn_implementation("eager")
    for i, layer in enumerate(plain.model.layers):
        graph = network.base_model.model.model.layers[i].self_attn.sparse_gin_modules["default"]
        state = {}
        layer.register_forward_pre_hook(lambda m, a, state=state: state.update(h=a[0]))

        def after(module, args, output, graph=graph, state=state):
            return output[0] + graph(state["h"] + output[0], output[1]), output[1]

        layer.self_attn.register_forward_hook(after)
    torch.testing.assert_close(answer(network, "llama"), answer(plain, "llama"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_sparse_and_dense_products_agree(share):
    """Values, and both gradients at the edges, with an upstream that differs everywhere; each input alone."""
    generator = torch.Generator().manual_seed(0)
    time, width = 160, 7
    keep = torch.rand(2, time, time, generator=generator) < share
    weights = torch.where(keep, torch.rand(2, time, time, generator=generator, dtype=torch.float64) + 0.5, 0.0)
    x = torch.randn(2, time, width, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, time, width, generator=generator, dtype=torch.float64)
    for which in ((True, True), (True, False), (False, True)):
        a = [weights.clone().requires_grad_(which[0]), x.clone().requires_grad_(which[1])]
        b = [weights.clone().requires_grad_(which[0]), x.clone().requires_grad_(which[1])]
        made, expected = neighbours(*a), b[0] @ b[1]
        torch.testing.assert_close(made, expected)
        (made * upstream).sum().backward()
        (expected * upstream).sum().backward()
        if which[0]:
            torch.testing.assert_close(a[0].grad[keep], b[0].grad[keep])
        if which[1]:
            torch.testing.assert_close(a[1].grad, b[1].grad)


def test_a_graph_without_edges():
    x = torch.randn(1, 130, 3, requires_grad=True)
    weights = torch.zeros(1, 130, 130, requires_grad=True)
    out = neighbours(weights, x)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()


def test_memory_at_512_tokens(capsys):
    """What backward keeps, in floats, over the sparse product and the dense one; printed."""
    probabilities = attention(4, 512, dtype=torch.float32)[:1]
    graph = filled(SparseGIN(32, 4, SparseGINConfig(hidden=155, dropout=0.0), 0.1, True))
    adjacency = graph.adjacency(probabilities).flatten(0, 1)
    density = float((adjacency != 0).float().mean())
    x = torch.randn(1, 512, 155, requires_grad=True)
    kept = {}
    for name, product in (("sparse", neighbours), ("dense", torch.matmul)):
        sizes = []
        a = adjacency.detach().clone().requires_grad_()

        def pack(t, sizes=sizes):
            sizes.append(3 * t._nnz() if t.is_sparse else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            product(a, x)
        kept[name] = sum(sizes)
    print(f"T = 512: {density:.1%} of the entries are edges; kept for backward, in floats: {kept}")
    assert density < 0.1
    assert kept["sparse"] < kept["dense"]


def test_lambda_is_linear_over_the_layers():
    assert [linear_scale((0.0, 0.5), i, 5) for i in range(5)] == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert linear_scale((0.0, 0.5), 0, 1) == 0.0
    network = adapted("llama", SparseGINConfig(hidden=6, scale_init=(0.0, 0.5)))
    assert [float(p) for n, p in network.named_parameters() if n.endswith(".scale")] == [0.0, 0.5]


def test_eager_attention_and_no_cache_are_set():
    network = adapted("llama", SparseGINConfig(hidden=6))
    assert network.base_model.model.config._attn_implementation == "eager"
    assert network.base_model.model.config.use_cache is False
    filled(network)
    prompt = IDS[:1, :4]
    made = network.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    row = prompt
    for _ in range(4):
        row = torch.cat([row, network(input_ids=row)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(made[:, : row.shape[1]], row[:, : made.shape[1]])


def test_without_maps_or_with_a_cache_it_says_what_to_do():
    network = adapted("llama", SparseGINConfig(hidden=6))
    first = network(input_ids=IDS, use_cache=True)
    with pytest.raises(ValueError, match="needs whole rows of text"):
        network(input_ids=IDS[:, :1], past_key_values=first.past_key_values, use_cache=True)
    network.base_model.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="it needs eager attention"):
        network(input_ids=IDS)


def test_it_trains_in_a_trainer_on_a_base_in_four_bits():
    pytest.importorskip("bitsandbytes")
    module = Foreign()
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    callback = PEFT({"peft_type": "SPARSE_GIN", "hidden": 6, "scale_init": [0.0, 0.5]}, quantization_config=nf4)
    callback.attach(module)
    before = {name: p.detach().clone() for name, p in trained(module).items()}
    fit(module, [callback], steps=2)
    assert any(not torch.equal(before[name], p) for name, p in trained(module).items())


def test_the_reference_graph_convolution():
    """With 0/1 edges and eps shifted by 1 (self edges) it is a GIN convolution: (1 + eps) x_i + sum over neighbours."""
    x = torch.randn(1, 5, 3)
    adjacency = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0.0]])
    with_self = neighbours((adjacency + torch.eye(5))[None], x)  # eps = 0 and a self edge of weight 1
    expected = x.clone()
    for i, j in adjacency.nonzero():
        expected[0, i] += x[0, j]
    torch.testing.assert_close(with_self, expected)
    assert F.relu(with_self).shape == x.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"combine": "max"}, "combine='max' is not known"),
        ({"hidden": 0}, "hidden=0 must be at least 1"),
        ({"dropout": 1}, "dropout=1 must be"),
        ({"keep_above": 1.0}, "keep_above=1.0 must be"),
        ({"sharpness": 0}, "sharpness=0 must be above 0"),
        ({"scale_init": [0.1]}, "scale_init=.* must be two numbers"),
        ({"per_head": True, "combine": "learned"}, "per_head=True keeps the heads' maps apart"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        SparseGINConfig(**given)
