"""The DSEE layer against its formula, its positions and masks against torch's own pruning, its life in plain `peft`."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.dsee import (
    DSEEConfig,
    DSEELayer,
    attentions,
    draw_positions,
    dsee_layers,
    packed,
    unpacked,
)
from lightning_peft.adapters.dsee_pruning import (
    head_scores,
    is_pruned,
    prune_entries,
    prune_heads,
    remove_heads,
    smallest,
    sparsities,
    update,
)
from lightning_peft.adapters.grebsmo import grebsmo, sparse_positions
from lightning_peft.callbacks import PEFT
from lightning_peft.export import export
from lightning_peft.merged import merged_state
from lightning_peft.quantization import quantize
from tests.adapted import Classifier, Foreign, loader, logits
from tests.adapters.networks import FAMILIES, adapted, answer, base, filled, trained
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

SMALL = {"r": 4, "alpha": 8, "num_sparse": 10, "positions": "magnitude"}
SEPARATE = ["llama", "bert", "t5", "vit"]  # queries, keys and values in layers of their own


def made(family: str, pruned: float = 0.0, **config):
    """A network of a family with a DSEE adapter that has learnt something, pruned or not."""
    if family == "vit":  # for which PEFT has no default targets
        config.setdefault("target_modules", ["q_proj", "v_proj"])
    network = filled(adapted(family, DSEEConfig(**{**SMALL, **config})))
    if pruned and config.get("prune") == "structured":
        prune_heads(network, "default", 1)
    elif pruned:
        prune_entries(network, "default", pruned, pruned)
    return network


def single(kind: str = "linear", **config) -> DSEELayer:
    """One layer of 6 inputs and 5 outputs in float64, everything random."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)).double()
    nn.init.normal_(network[0].bias)
    arguments = {"r": 2, "alpha": 6, "num_sparse": 4, "positions": "random", "target_modules": ["0"]}
    tuned = peft.get_peft_model(network, DSEEConfig(**{**arguments, **config})).double()
    layer = tuned.base_model.model[0]
    for parameter in (layer.dsee_U.default, layer.dsee_S.default):
        nn.init.normal_(parameter)
    return layer


def dense(layer: DSEELayer) -> dict[str, torch.Tensor]:
    """W [out, in], U, V and a dense S2, from what the layer stores."""
    weight = layer.get_base_layer().weight.detach()
    rows, columns = layer.dsee_positions.default
    sparse = torch.zeros(5, 6, dtype=torch.float64)
    for i, j, value in zip(rows.tolist(), columns.tolist(), layer.dsee_S.default.tolist()):
        sparse[i, j] = value
    w = weight.T if layer.stored_in_out else weight
    return {"w": w, "u": layer.dsee_U.default.detach(), "v": layer.dsee_V.default.detach(), "s": sparse}


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("pruned", [False, True])
def test_forward_and_gradients_are_those_of_the_formula(kind, pruned):
    """(W * S1) x + b + s (U V + S2) x, by dense matrices and autograd, with an upstream that is not uniform."""
    layer = single(kind)
    mask = torch.ones(5, 6, dtype=torch.bool)
    if pruned:
        mask = torch.rand(5, 6) > 0.4
        layer.dsee_mask.put("default", packed(mask.T if layer.stored_in_out else mask))
    parts = {name: value.requires_grad_() for name, value in dense(layer).items()}
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = x @ ((parts["w"] * mask) + 3.0 * (parts["u"] @ parts["v"] + parts["s"])).T + layer.get_base_layer().bias
    wanted = torch.autograd.grad(expected, [x, *parts.values()], upstream)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, [x, layer.dsee_U.default, layer.dsee_V.default, layer.dsee_S.default], upstream)
    rows, columns = layer.dsee_positions.default
    dx, _, du, dv, ds = wanted
    for got, want in zip(found, (dx, du, dv, ds[rows, columns])):
        torch.testing.assert_close(got, want)


def test_the_gradient_of_s2_is_dw_at_its_places_and_no_matrix_of_that_size_is_made():
    """sum_t dY[t, i] X[t, j], gathered; S1's product makes the masked matrix, and keeps it for no backward."""
    torch.manual_seed(0)
    network = peft.get_peft_model(
        nn.Sequential(nn.Linear(96, 80)), DSEEConfig(r=2, num_sparse=7, target_modules=["0"], positions="random")
    )
    layer = network.base_model.model[0]
    x, upstream = torch.randn(5, 96, requires_grad=True), torch.randn(5, 80)
    made_in_all: list[int] = []
    kept: list[int] = []
    weight = layer.base_layer.weight.data_ptr()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != weight:
                made_in_all.append(out.numel())
            return out

    def keep(tensor):
        kept.append(0 if tensor.data_ptr() == weight else tensor.numel())
        return tensor

    with Sizes(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x).backward(upstream)
    assert max(made_in_all) == 5 * 96, "a tensor as large as the matrix was made"
    dw = layer.scaling["default"] * upstream.T @ x.detach()
    rows, columns = layer.dsee_positions.default
    torch.testing.assert_close(layer.dsee_S.default.grad, dw[rows, columns])
    # Pruned, the masked matrix is made for each product and kept for none.
    layer.dsee_mask.put("default", packed(torch.rand(80, 96) > 0.5))
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x).backward(upstream)
    assert max(kept) == 5 * 96
    assert network.base_model.model[0].base_layer.weight.grad is None


def test_it_is_no_worse_under_bf16_mixed_than_plain_torch():
    layer = single().float()
    layer.dsee_mask.put("default", packed(torch.rand(5, 6) > 0.3))
    x, upstream = torch.randn(64, 6, requires_grad=True), torch.randn(64, 5)
    trains = [x, layer.dsee_U.default, layer.dsee_V.default, layer.dsee_S.default]
    exact = torch.autograd.grad(layer(x), trains, upstream)
    parts = dense(layer)
    u, v = (parts[k].float().requires_grad_() for k in "uv")
    s = parts["s"].float().requires_grad_()
    mask = unpacked(layer.dsee_mask.default, torch.Size((5, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(layer(x), trains, upstream)
        f = nn.functional.linear
        plain = f(x, parts["w"].float() * mask, layer.base_layer.bias) + 3.0 * (f(f(x, v), u) + f(x, s))
        theirs = torch.autograd.grad(plain, [x, u, v, s], upstream)
    theirs = (*theirs[:3], theirs[3][tuple(layer.dsee_positions.default)])
    for got, other, truth in zip(found, theirs, exact):
        assert float((got - truth).abs().max()) <= 1.5 * float((other - truth).abs().max()) + 1e-3
        assert got.dtype == torch.float32


@pytest.mark.parametrize("positions", ["grebsmo", "random", "magnitude"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_count_is_exact(family, positions):
    """r (out + in) + N for each matrix."""
    targets = {"vit": ["q_proj", "v_proj"]}.get(family)
    network = adapted(family, DSEEConfig(r=3, num_sparse=11, positions=positions, target_modules=targets))
    layers = [x for x in dsee_layers(network, "default").values() if "default" in x.dsee_U]
    assert layers
    by_hand = sum(3 * sum(layer.get_base_layer().weight.shape) + 11 for layer in layers)
    assert sum(p.numel() for name, p in trained(network).items() if "dsee_" in name) == by_hand
    for layer in layers:
        rows, columns = layer.dsee_positions.default
        assert len(set(zip(rows.tolist(), columns.tolist()))) == 11


def test_queries_and_values_are_adapted_by_default():
    layers = dsee_layers(adapted("bert", DSEEConfig(**SMALL)), "default")
    assert {n.rpartition(".")[2] for n, x in layers.items() if "default" in x.dsee_U} == {"query", "value"}
    others = {n.rpartition(".")[2] for n, x in layers.items() if "default" in x.dsee_mask and "default" not in x.dsee_U}
    assert others == {"key", "dense"}  # as the authors' script names them


def test_it_starts_as_the_base():
    for family in FAMILIES:
        targets = {"vit": ["q_proj", "v_proj"]}.get(family)
        network = adapted(family, DSEEConfig(**SMALL, target_modules=targets))
        with torch.no_grad():
            assert torch.equal(answer(network, family), answer(base(family), family))


def test_gradient_checkpointing_changes_nothing():
    batch, found = next(iter(loader())), []
    for recompute in (False, True):
        module = Foreign()
        if recompute:
            module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        PEFT(DSEEConfig(**SMALL)).attach(module)
        filled(module)
        prune_entries(module.net, "default", 0.3, 0.3)
        module.train().loss(batch).backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


# -- positions --------------------------------------------------------------------------------------------------------


def by_the_script(weight: torch.Tensor, start: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GreBsmo written out as in the authors' `run_glue_prune_with_WAB.py`: S thresholded, whole QRs; U V and S."""
    v = start
    for _ in range(rounds):
        s = torch.zeros_like(weight)
        for _ in range(2):
            u = torch.linalg.qr((weight - s) @ v.T)[0]
            v = u.T @ (weight - s)
            s = weight - u @ v
            s[s.abs() < 0.01] = 0
        e = weight - u @ v - s
        v = torch.cat([v, torch.linalg.qr(e)[1][:5]], 0)
    return u @ v[: u.shape[1]], s


@pytest.mark.parametrize(("shape", "rounds"), [((64, 48), 7), ((40, 72), 6)])
def test_grebsmo_is_the_authors_procedure(shape, rounds):
    """To as many rounds as V has rows for: 5 more each time, up to 0.65 of the shorter side."""
    weight = torch.randn(shape).double() * 0.04
    start = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(7)).double()
    for n in (1, 2, rounds):
        low_rank, sparse = by_the_script(weight, start, n)
        residual = grebsmo(weight, torch.Generator().manual_seed(7), rounds=n)
        torch.testing.assert_close(residual, weight - low_rank, rtol=0, atol=1e-8)
    # Their rule on S, for the whole of it: its 12th largest entry is the threshold.
    value = torch.kthvalue(sparse.abs().view(-1), sparse.numel() - 12 + 1).values
    rows, columns = sparse_positions(weight, 12, "grebsmo", seed=7)
    assert torch.equal((sparse.abs() >= value).nonzero().T, torch.stack([rows, columns]))


def test_magnitude_and_random_positions():
    weight = torch.randn(9, 7)
    rows, columns = sparse_positions(weight, 8, "magnitude")
    assert set(weight[rows, columns].abs().tolist()) == set(weight.abs().flatten().sort().values[-8:].tolist())
    one, again, other = (sparse_positions(weight, 8, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    full = sparse_positions(weight, 63, "random")
    assert torch.equal(full[0] * 7 + full[1], torch.arange(63))


def test_positions_are_where_the_transposed_weight_says():
    """GPT-2 stores W as [in, out]: the positions are still rows of outputs and columns of inputs."""
    network = adapted("gpt2", DSEEConfig(**SMALL))
    for layer in dsee_layers(network, "default").values():
        if "default" in layer.dsee_U:
            rows, columns = layer.dsee_positions.default
            values = layer.base_layer.weight.detach()[columns, rows].abs()
            assert torch.equal(
                values.sort().values, layer.base_layer.weight.detach().abs().flatten().sort().values[-10:]
            )


def test_positions_that_nobody_has_set_are_not_used():
    network = adapted("llama", DSEEConfig(**{**SMALL, "positions": "stored"}))
    with pytest.raises(RuntimeError, match="neither drawn nor loaded"):
        answer(network, "llama")


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65])
def test_a_packed_mask_is_the_mask(n):
    mask = torch.rand(n) > 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == (n + 7) // 8
    assert torch.equal(unpacked(bits, mask.shape), mask)
    assert (packed(torch.ones(n, dtype=torch.bool)) == 255).all()


@pytest.mark.parametrize("k", [1, 2, 50, 300, 599, 600])
def test_the_k_smallest_end_where_a_sort_says(k):
    tensors = [torch.rand(20, 10), torch.zeros(100), torch.rand(200).round(decimals=1), torch.rand(100) * 1e-20]
    bits, ties = smallest(lambda: iter(tensors), k)
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    everything = torch.cat([t.flatten() for t in tensors])
    assert value == everything.sort().values[k - 1]
    assert ties == k - int((everything < value).sum())


def with_torch(family: str, network: nn.Module, sparsity: float, others: float, score: str) -> dict[str, torch.Tensor]:
    """Which entries torch's own global pruning keeps, as the authors' script calls it, on weights with the update."""
    plain = base(family)
    groups: dict[bool, list[nn.Module]] = {True: [], False: []}
    for name, layer in dsee_layers(network, "default").items():
        target = plain.get_submodule(name)
        is_adapted = "default" in layer.dsee_U
        if is_adapted:
            change = layer.get_delta_weight("default")
            target.weight.data = target.weight.data + change if score == "WABS" else change.contiguous()
        groups[is_adapted].append(target)
    for is_adapted, amount in ((True, sparsity), (False, others)):
        prune.global_unstructured([(m, "weight") for m in groups[is_adapted]], prune.L1Unstructured, amount=amount)
    return {name: plain.get_submodule(name).weight_mask.bool() for name in dsee_layers(network, "default")}


@pytest.mark.parametrize("score", ["WABS", "ABS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_torchs_global_pruning_and_sparsity_is_exact(family, score):
    network = made(family)
    layers = dsee_layers(network, "default")
    prune_entries(network, "default", 0.37, 0.21, score)
    for name, mask in with_torch(family, network, 0.37, 0.21, score).items():
        assert torch.equal(unpacked(layers[name].dsee_mask.default, mask.shape), mask), name
    sizes = {"adapted": 0, "others": 0}
    for layer in layers.values():
        sizes["adapted" if "default" in layer.dsee_U else "others"] += layer.get_base_layer().weight.numel()
    wanted = {"adapted": round(0.37 * sizes["adapted"]), "others": round(0.21 * sizes["others"])}
    assert {group: round(share * sizes[group]) for group, share in sparsities(network, "default").items()} == wanted


def test_sparsity_is_exact_when_scores_are_equal():
    """Before training every change is 0: of equal ones the first go, and exactly as many as asked for."""
    network = adapted("llama", DSEEConfig(**SMALL))
    prune_entries(network, "default", 0.25, 0.0, "ABS")
    shares = sparsities(network, "default")
    assert shares == {"adapted": 0.25, "others": 0.0}


def test_heads_and_embeddings_are_never_pruned_nor_what_trains_whole():
    network = adapted("bert", DSEEConfig(**SMALL, modules_to_save=["pooler"]))
    names = dsee_layers(network, "default")
    assert not [name for name in names if "embed" in name or "classifier" in name or "pooler" in name]
    assert any("pooler" in name for name in dsee_layers(adapted("bert", DSEEConfig(**SMALL)), "default"))


def test_two_adapters_keep_what_both_keep():
    network = made("llama", 0.3)
    network.add_adapter("other", DSEEConfig(**{**SMALL, "target_modules": ["o_proj"]}))
    prune_entries(network, "other", 0.4, 0.4)
    network.base_model.set_adapter(["default", "other"])
    layer = dsee_layers(network, "other")["model.layers.0.self_attn.q_proj"]
    masks = [unpacked(layer.dsee_mask[name], torch.Size((32, 32))) for name in ("default", "other")]
    x = torch.eye(32)
    plain = x @ (layer.base_layer.weight * masks[0] * masks[1]).T
    torch.testing.assert_close(layer(x), plain + x @ layer.get_delta_weight("default").T)
    before = answer(network, "llama").detach()
    network.merge_adapter(["other"])
    network.merge_adapter(["default"])
    torch.testing.assert_close(answer(network, "llama"), before, rtol=0, atol=1e-5)
    network.unmerge_adapter()
    torch.testing.assert_close(answer(network, "llama"), before, rtol=0, atol=1e-5)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["WABS", "ABS"])
@pytest.mark.parametrize("family", SEPARATE)
def test_head_scores_are_sums_over_a_heads_rows(family, score):
    """By loops, as the authors' script sums them; where queries share a key, those of a group together."""
    network = made(family, prune="structured")
    layers = dsee_layers(network, "default")
    for part in attentions(network.base_model.model):
        scores = []
        for group in range(part.groups):
            total = 0.0
            for name, rows in ((part.query, part.queries * part.width), (part.value, part.width)):
                layer = layers[name]
                total += float(update(layer, "default")[group * rows : (group + 1) * rows].abs().sum())
                if score == "WABS":
                    total += float(layer.base_layer.weight[group * rows : (group + 1) * rows].abs().sum())
            scores.append(total)
        assert head_scores(network, part, "default", score).tolist() == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("score", ["WABS", "ABS"])
def test_bert_heads_are_those_of_the_authors_lines(score):
    """Their chunks of 4 heads, both matrices in one sum, and argsort."""
    network = made("bert", prune="structured")
    prune_heads(network, "default", 2, score)
    for block in network.base_model.model.bert.encoder.layer:
        own = block.attention.self
        total = update(own.query, "default").abs() + update(own.value, "default").abs()
        if score == "WABS":
            total = total + own.query.base_layer.weight.abs() + own.value.base_layer.weight.abs()
        chunks = torch.stack([c.sum() for c in torch.chunk(total.sum(1), 4)])
        gone = (~block.attention.output.dense.dsee_columns.default.view(4, -1)).all(1).nonzero().flatten()
        assert gone.tolist() == sorted(torch.argsort(chunks)[:2].tolist())


@pytest.mark.parametrize("targets", ["queries and values", "all"])
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_heads_are_removed_for_real(family, targets):
    """Smaller tensors, and the logits of the network whose heads are zeroed; the output projection adapted as well."""
    names = {"llama": "qkvo", "vit": "qkvo", "t5": "qkvo", "bert": None}[family]
    chosen = {"llama": "_proj", "vit": "_proj", "t5": ""}.get(family)
    config = {"prune": "structured"}
    if targets == "all":
        config["target_modules"] = (
            [f"{n}{chosen}" for n in names] if names else ["query", "key", "value", "output.dense"]
        )
    network = made(family, **config)
    whole = answer(network, family).detach()
    prune_heads(network, "default", 1)
    zeroed = answer(network, family).detach()
    assert not torch.equal(zeroed, whole)
    before = sum(p.numel() for p in base(family).parameters())
    shapes = {
        part.output: network.base_model.model.get_submodule(part.output).base_layer.weight.shape
        for part in attentions(network.base_model.model)
    }
    cut = remove_heads(network)
    torch.testing.assert_close(answer(cut, family), zeroed, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < before
    for part in attentions(cut):
        out, width = shapes[part.output]
        share = {"llama": 1 / 2}.get(family, 3 / 4)  # of two key-value heads one; of four heads three
        assert cut.get_submodule(part.output).weight.shape == (out, width * share)
        assert cut.get_submodule(part.query).weight.shape[0] == width * share
        assert cut.get_submodule(part.key).weight.shape[0] == cut.get_submodule(part.value).weight.shape[0]
    assert not [name for name, _ in cut.named_parameters() if "dsee" in name]


def test_heads_that_share_a_position_bias_are_masked_but_not_cut():
    """T5's first block has a bias for each head, which all blocks read: they would have to drop the same."""
    network = made("t5", 1, prune="structured")
    with pytest.raises(ValueError, match=r"relative_attention_bias.*keep the heads masked"):
        remove_heads(network)
    assert is_pruned(network, "default")


def test_a_llama_without_its_heads_is_a_folder_of_transformers(tmp_path):
    network = made("llama", 1, prune="structured")
    expected = answer(network, "llama").detach()
    remove_heads(network).save_pretrained(tmp_path)
    loaded, info = type(tiny_llama()).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.num_attention_heads == 2
    assert loaded.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    torch.testing.assert_close(answer(loaded.eval(), "llama"), expected, rtol=0, atol=1e-5)


def test_zeroing_is_what_a_masked_context_computes():
    """Independent of the layer: the context of a dropped head is set to 0 by a hook on the plain network."""
    network = made("bert", 1, prune="structured")
    plain = base("bert")
    state = merged_state(network)
    for name, layer in dsee_layers(network, "default").items():
        if "default" in layer.dsee_columns:
            kept = layer.dsee_columns.default
            state[f"{name}.weight"] = base("bert").get_submodule(name).weight  # the output projection is not adapted
            hook = lambda module, args, kept=kept: (args[0] * kept, *args[1:])  # noqa: E731
            plain.get_submodule(name).register_forward_pre_hook(hook)
    plain.load_state_dict(state)
    torch.testing.assert_close(answer(network, "bert"), answer(plain, "bert"), rtol=0, atol=1e-5)


# -- peft -------------------------------------------------------------------------------------------------------------

KINDS = {"plain": {"prune": "none"}, "entries": {"pruned": 0.3}, "heads": {"pruned": 1, "prune": "structured"}}
CASES = [(f, k) for f in FAMILIES for k in KINDS if not (f == "gpt2" and k == "heads")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_round_trips(family, kind, tmp_path):
    """Plain PEFT: disk, a second name, off and on, copies, merge and unmerge, unload."""
    network = made(family, **KINDS[kind])
    with torch.no_grad():
        plain, out = answer(base(family), family), answer(network, family)
    assert not torch.equal(out, plain)
    network.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), str(tmp_path), adapter_name="another").eval()
    assert loaded.peft_config["another"].positions == "stored"
    assert network.peft_config["default"].positions == "magnitude"
    with torch.no_grad():
        assert torch.equal(answer(loaded, family), out)
        assert torch.equal(answer(copy.deepcopy(network), family), out)
        with network.disable_adapter():
            assert torch.equal(answer(network, family), plain)
        network.merge_adapter()
        torch.testing.assert_close(answer(network, family), out, rtol=0, atol=3e-5)
        network.unmerge_adapter()
        torch.testing.assert_close(answer(network, family), out, rtol=0, atol=3e-5)
        weights = base(family).state_dict()
        for name, layer in dsee_layers(network, "default").items():
            torch.testing.assert_close(layer.base_layer.weight, weights[f"{name}.weight"], rtol=0, atol=1e-6)
        merged = copy.deepcopy(network).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(answer(merged, family), out, rtol=0, atol=3e-5)
        unloaded = network.unload()
        torch.testing.assert_close(answer(unloaded, family), plain, rtol=0, atol=3e-5)
    assert unloaded.state_dict().keys() == weights.keys()


def test_a_saved_adapter_holds_positions_and_mask_of_one_bit_an_entry(tmp_path):
    from safetensors.torch import load_file

    made("llama", 0.3).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    place = "base_model.model.model.layers.0.self_attn.q_proj.dsee_"
    assert {key.removeprefix(place) for key in saved if key.startswith(place)} == {"U", "V", "S", "positions", "mask"}
    assert saved[f"{place}mask"].shape == (32 * 32 / 8,)
    assert saved[f"{place}positions"].shape == (2, 10)
    assert saved[f"{place}S"].shape == (10,)


def test_export_and_plain_peft_agree(tmp_path):
    module = Foreign()
    PEFT(DSEEConfig(**SMALL)).attach(module)
    filled(module)
    prune_entries(module.net, "default", 0.3, 0.2)
    export(module, str(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert torch.equal(logits(theirs), logits(module.net))
    export(module, str(tmp_path / "merged"), merge=True)
    plain = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(module.net), rtol=0, atol=1e-5)
    ours = Foreign()
    PEFT(adapter=str(tmp_path / "adapter")).attach(ours)
    assert torch.equal(logits(ours.net), logits(module.net))
    assert is_pruned(ours.net, "default")


@pytest.mark.parametrize("kind", ["entries", "heads"])
def test_unmerging_in_half_precision_gives_the_masked_entries_back(kind):
    options = {**KINDS[kind], "prune": KINDS[kind].get("prune", "unstructured")}
    network = made("llama", **options).to(torch.bfloat16)
    before = {name: layer.base_layer.weight.clone() for name, layer in dsee_layers(network, "default").items()}
    out = answer(network, "llama").detach()
    network.merge_adapter(safe_merge=True)
    torch.testing.assert_close(answer(network, "llama"), out, rtol=0, atol=5e-2)
    network.unmerge_adapter()
    for name, layer in dsee_layers(network, "default").items():
        kept = layer.kept(["default"])
        weight = layer.base_layer.weight
        assert weight.dtype == torch.bfloat16
        if kept is not None:
            assert torch.equal(weight[~kept], before[name][~kept]), "masked entries come back to the bit"
        torch.testing.assert_close(weight, before[name], rtol=0, atol=2e-2)


def test_a_classification_head_trains_and_is_saved(tmp_path):
    module = Classifier()
    PEFT(DSEEConfig(**SMALL)).attach(module)
    filled(module)
    export(module, str(tmp_path))
    theirs = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert torch.equal(logits(theirs), logits(module.net))


@pytest.mark.parametrize("prune_kind", ["none", "structured"])
def test_a_4_bit_base(prune_kind):
    pytest.importorskip("bitsandbytes")
    module = Foreign(hidden=64)  # bitsandbytes needs a block of 64 in a row
    quantize(module.net, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    PEFT(DSEEConfig(r=4, num_sparse=10, prune=prune_kind)).attach(module)
    filled(module)
    if prune_kind == "structured":
        prune_heads(module.net, "default", 1)
        with pytest.raises(ValueError, match="4- or 8-bit weight cannot be cut out"):
            remove_heads(module.net)
    module.loss(next(iter(loader()))).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "dsee_" in n)
    layer = dsee_layers(module.net, "default")["model.layers.0.self_attn.q_proj"]
    assert layer.base_layer.weight.grad is None
    out = logits(module.net)
    for one in dsee_layers(module.net, "default").values():
        one.enable_adapters(False)
    assert not torch.equal(logits(module.net), out)
    with pytest.raises(ValueError, match="rounds the update away"):
        layer.merge()


def test_entries_of_a_4_bit_base_are_not_pruned():
    pytest.importorskip("bitsandbytes")
    module = Foreign(hidden=64)
    quantize(module.net, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ValueError, match=r"stored in 4 or 8 bits: use prune='none' or 'structured'"):
        PEFT(DSEEConfig(**SMALL)).attach(module)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r=0, num_sparse=10 and alpha=8 must be at least 1"),
        ({"num_sparse": 0}, "num_sparse=0"),
        ({"positions": "best"}, r"positions='best' is not known: use one of \('grebsmo', 'random', 'magnitude'"),
        ({"prune": "all"}, r"prune='all' is not known: use one of \('none', 'unstructured', 'structured'\)"),
        ({"num_sparse": 2000}, r"num_sparse=2000 and a matrix of \[32, 32\] has 1024 entries"),
        ({"target_modules": ["nothing"]}, "target_modules.*nothing"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PEFT(DSEEConfig(**{**SMALL, **arguments})).attach(Foreign())


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match=r"adapts linear layers \(nn.Linear, Conv1D\), and this is a Embedding"):
        PEFT(DSEEConfig(**SMALL, target_modules=["embed_tokens"])).attach(Foreign())


def test_fused_heads_are_refused():
    with pytest.raises(
        ValueError, match=r"needs queries, keys, values and output as layers of their own.*unstructured"
    ):
        peft.get_peft_model(tiny_gpt2(), DSEEConfig(**SMALL, prune="structured"))


def test_heads_need_both_updates_and_one_has_to_stay():
    network = made("vit", prune="structured", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"scored by the updates of queries and values, and .*v_proj has none"):
        prune_heads(network, "default", 1)
    with pytest.raises(ValueError, match=r"heads=4: .* has 4 \(key-value\) heads, of which at least one has to stay"):
        prune_heads(made("vit", prune="structured"), "default", 4)
    with pytest.raises(ValueError, match="no head has been dropped by the adapter 'default'"):
        remove_heads(made("vit", prune="structured"))


def test_positions_are_not_drawn_without_weights():
    with torch.device("meta"):
        network = peft.get_peft_model(tiny_vit(), DSEEConfig(**SMALL, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"positions='grebsmo' reads the weights, and .*q_proj has none \(meta device\)"
    ):
        draw_positions(network, "default", "grebsmo")
