"""Parts of weights that train: gradients against the whole weight's, what is kept and held, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_peft.parts import Part, PartLeaf, leaves_of, write_back
from tests.processes import run_on_two
from tests.tiny import tiny_mixtral

OUT, IN = 10, 6
PARTS = {
    "columns": Part(1, [2, 3]),
    "columns around the edge": Part.block(1, 5, 3, IN),
    "any columns": Part(1, [4, 0, 3]),
    "rows": Part(0, [7]),
    "any rows": Part(0, [9, 2, 3, 0]),
    "entries": Part(None, [0, 7, 25, 59, 12]),
}


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Two equal layers, the first one's weight frozen."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT) if kind == "Linear" else Conv1D(OUT, IN)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.to(dtype)
    whole = copy.deepcopy(layer)
    layer.weight.requires_grad_(False)
    return layer, whole


def stored(part: Part, kind: str) -> Part:
    """A part of W [out, in] in a layer that stores [in, out]."""
    if kind == "Linear":
        return part
    if part.dim is None:
        return Part(None, (part.index % IN) * OUT + part.index // IN)
    return Part(1 - part.dim, part.index)


# -- which entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_take_and_put_are_indexing(part):
    weight = torch.arange(60.0).view(OUT, IN)
    rows, columns = torch.arange(OUT)[:, None], torch.arange(IN)[None]
    expected = {
        0: lambda: weight[part.index],
        1: lambda: weight[:, part.index],
        None: lambda: weight.flatten()[part.index],
    }[part.dim]()
    assert torch.equal(part.take(weight), expected)
    assert part.shape(weight.shape) == tuple(expected.shape)
    changed = weight.clone()
    part.put_(changed, -torch.ones_like(expected))
    inside = {
        0: torch.isin(rows, part.index).expand(OUT, IN),
        1: torch.isin(columns, part.index).expand(OUT, IN),
        None: torch.isin(rows * IN + columns, part.index),
    }[part.dim]
    assert torch.equal(changed, torch.where(inside, -1.0, weight))


def test_a_block_wraps_around_the_edge():
    assert Part.block(0, 4, 3, 6).index.tolist() == [4, 5, 0]
    assert Part.block(0, 4, 2, 6).start == 4
    assert Part.block(0, 4, 3, 6).start is None


def test_refuses_what_is_no_part():
    with pytest.raises(ValueError, match="no entries"):
        Part(0, [])
    with pytest.raises(ValueError, match="all different"):
        Part(0, [1, 2, 1])
    with pytest.raises(ValueError, match="0 or more"):
        Part(0, [-1])
    with pytest.raises(ValueError, match=r"position 6 is not in a weight of 6 positions along dimension 1"):
        PartLeaf(nn.Linear(IN, OUT), "weight", Part(1, [6]))
    with pytest.raises(ValueError, match=r"position 60 .* 60 entries"):
        PartLeaf(nn.Linear(IN, OUT), "weight", Part(None, [60]))


# -- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("name", PARTS)
def test_gradients_equal_the_whole_weights(kind, name):
    layer, whole = pair(kind)
    part = stored(PARTS[name], kind)
    leaf = PartLeaf(layer, "weight", part)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 3, OUT, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, whole(other))
    y.backward(upstream)
    whole(other).backward(upstream)
    torch.testing.assert_close(leaf.leaf.grad, part.take(whole.weight.grad), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, whole.bias.grad, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("weight_too", [True, False])
def test_entries_of_a_bias(kind, weight_too):
    """Beside rows of the weight, as a row's neuron is trained, and alone."""
    layer, whole = pair(kind)
    rows = [4, 1]
    of_bias = PartLeaf(layer, "bias", Part(0, rows))
    part = Part(0 if kind == "Linear" else 1, rows)
    of_weight = PartLeaf(layer, "weight", part) if weight_too else None
    x = torch.randn(3, IN, dtype=torch.float64)
    upstream = torch.randn(3, OUT, dtype=torch.float64)
    layer(x).backward(upstream)
    whole(x).backward(upstream)
    torch.testing.assert_close(of_bias.leaf.grad, whole.bias.grad[rows], rtol=1e-12, atol=1e-12)
    assert layer.bias.grad is None
    if of_weight is not None:
        torch.testing.assert_close(of_weight.leaf.grad, part.take(whole.weight.grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alone", ["x", "bias", "leaf"])
def test_each_gradient_alone(alone):
    layer, _ = pair("Linear")
    leaf = PartLeaf(layer, "weight", PARTS["columns"])
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=alone == "x")
    layer.bias.requires_grad_(alone == "bias")
    leaf.leaf.requires_grad_(alone == "leaf")
    layer(x).square().sum().backward()
    assert (x.grad is None, layer.bias.grad is None, leaf.leaf.grad is None) == tuple(
        name != alone for name in ("x", "bias", "leaf")
    )


def test_gradcheck_through_the_leaf():
    """Numerically: the loss as a function of the leaf, whose values are written into the weight."""
    layer, _ = pair("Linear")
    leaf = PartLeaf(layer, "weight", PARTS["any rows"])
    x, upstream = torch.randn(4, IN, dtype=torch.float64), torch.randn(4, OUT, dtype=torch.float64)
    (layer(x).tanh() * upstream).sum().backward()
    step = 1e-6
    numeric = torch.zeros_like(leaf.leaf)
    for place in range(leaf.leaf.numel()):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.leaf.view(-1)[place] += sign * step
            write_back([leaf])
            losses.append((layer(x).tanh() * upstream).sum().item())
            with torch.no_grad():
                leaf.leaf.view(-1)[place] -= sign * step
        numeric.view(-1)[place] = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(leaf.leaf.grad, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PARTS)
def test_no_worse_than_torch_in_bf16(name):
    """Under autocast the part's gradient is as near to the truth as torch's own."""
    layer, whole = pair("Linear", torch.float32)
    part = PARTS[name]
    leaf = PartLeaf(layer, "weight", part)
    x, upstream = torch.randn(64, IN), torch.randn(64, OUT)
    exact = upstream.double().t() @ x.double()
    with torch.autocast("cpu", torch.bfloat16):
        made, reference = layer(x), whole(x)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, reference)
    made.backward(upstream.bfloat16())
    reference.backward(upstream.bfloat16())
    assert leaf.leaf.grad.dtype == torch.float32
    error = (leaf.leaf.grad - part.take(exact)).abs().max()
    assert error <= (part.take(whole.weight.grad) - part.take(exact)).abs().max() + 0.05


def test_bf16_weights_and_gradient_checkpointing():
    layer, whole = pair("Linear", torch.bfloat16)
    leaf = PartLeaf(layer, "weight", PARTS["columns"])
    x = torch.randn(5, IN, dtype=torch.bfloat16, requires_grad=True)
    for reentrant in (False, True):
        leaf.leaf.grad = whole.weight.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).float().square().sum().backward()
        whole(x).float().square().sum().backward()
        torch.testing.assert_close(leaf.leaf.grad, PARTS["columns"].take(whole.weight.grad), rtol=2e-2, atol=2e-2)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that the backward keeps, weights aside."""

    def __init__(self, *weights: torch.Tensor) -> None:
        self.bytes, own = 0, {w.untyped_storage().data_ptr() for w in weights}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                self.bytes += tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> Kept:  # type: ignore[override]
        super().__enter__()
        return self


def test_columns_keep_only_their_inputs():
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    x = torch.randn(100, 64)
    for rank in (1, 2, 8):
        leaf = PartLeaf(layer, "weight", Part.block(1, 5, rank, 64))
        with Kept(layer.weight) as kept:
            layer(x)
        assert kept.bytes == 100 * rank * 4  # storages, not views: x itself would be 100 x 64
        leaf.detach()


def test_gradient_and_optimizer_state_have_the_parts_size():
    layer = nn.Linear(64, 32).requires_grad_(False)
    leaf = PartLeaf(layer, "weight", Part(1, [3]))
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.5)
    layer(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert leaf.leaf.grad.shape == state["exp_avg"].shape == (32, 1)


def test_nothing_is_kept_without_gradients():
    layer, whole = pair("Linear")
    PartLeaf(layer, "weight", PARTS["rows"])
    with torch.no_grad(), Kept(layer.weight) as kept:
        y = layer(torch.ones(2, IN, dtype=torch.float64))
    assert not kept.bytes
    assert y.grad_fn is None
    assert torch.equal(y, whole(torch.ones(2, IN, dtype=torch.float64)))


class Unusual(nn.Linear):
    """Computes with its weight in a way that has no form of its own."""

    def forward(self, x):
        assert self.weight.shape == (OUT, IN)
        assert self.weight.dtype == x.dtype
        return torch.einsum("ti,oi->to", x, self.weight.tanh()) + self.weight.sum(1)


@pytest.mark.parametrize("name", PARTS)
def test_any_other_use_of_the_weight(name):
    layer = Unusual(IN, OUT, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    layer.weight.requires_grad_(False)
    leaf = PartLeaf(layer, "weight", PARTS[name])
    x = torch.randn(3, IN, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole(x).square().sum().backward()
    torch.testing.assert_close(leaf.leaf.grad, PARTS[name].take(whole.weight.grad), rtol=1e-12, atol=1e-12)


# -- experts ----------------------------------------------------------------------------------------------------------


def experts(family: str, implementation: str) -> nn.Module:
    if family == "mixtral":
        found = tiny_mixtral(layers=1, num_local_experts=5).model.layers[0].mlp.experts
    else:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        found = GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=5))
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.1)
    found.config._experts_implementation = implementation
    return found.requires_grad_(False)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_some_experts_of_a_fused_tensor(family, implementation):
    module = experts(family, implementation)
    names = [name for name, _ in module.named_parameters()]
    whole = copy.deepcopy(module).requires_grad_(True)
    part = Part(0, [3, 1])
    leaves = {name: PartLeaf(module, name, part) for name in names}
    hidden = torch.randn(12, 32, requires_grad=True)
    weights, chosen = torch.rand(12, 5).topk(2)
    upstream = torch.randn(12, 32)
    made, expected = module(hidden, chosen, weights), whole(hidden, chosen, weights)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    (made * upstream).sum().backward()
    d_hidden, hidden.grad = hidden.grad, None
    (expected * upstream).sum().backward()
    torch.testing.assert_close(d_hidden, hidden.grad, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.leaf.grad, part.take(getattr(whole, name).grad), rtol=1e-5, atol=1e-6)
        assert getattr(module, name).grad is None


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_that_no_token_went_to_get_zeros(implementation):
    module = experts("mixtral", implementation)
    leaf = PartLeaf(module, "down_proj", Part(0, [4]))
    hidden = torch.randn(3, 32, requires_grad=True)
    module(hidden, torch.tensor([[0, 1]] * 3), torch.ones(3, 2)).sum().backward()
    assert leaf.leaf.grad is not None
    assert not leaf.leaf.grad.any()


def test_grouped_products_keep_the_rows_of_experts_that_train():
    module = experts("mixtral", "grouped_mm")
    hidden = torch.randn(40, 32)  # wants no gradient, so that only the leaves' is made
    chosen = torch.arange(40)[:, None] % 5
    sizes = []
    for index in ([2], [2, 0], [0, 1, 2, 3, 4]):
        leaf = PartLeaf(module, "gate_up_proj", Part(0, index))
        weights = [p for p in module.parameters() if p is not leaf.leaf]
        with Kept(*weights) as kept:
            module(hidden, chosen, torch.ones(40, 1))
        sizes.append(kept.bytes)
        leaf.detach()
    assert sizes[1] - sizes[0] == 8 * 32 * 4
    assert sizes[2] - sizes[0] == 4 * 8 * 32 * 4


# -- the leaf on its module -------------------------------------------------------------------------------------------


def test_a_leaf_trains_and_moves():
    """Two slices by hand: what the first learned stays when the second trains; all else keeps its bits."""
    layer, before = pair("Linear", torch.float32)
    layer.bias.requires_grad_(False)
    leaf = PartLeaf(layer, "weight", Part(1, [0, 1]))
    same = leaf.leaf
    x, target = torch.randn(32, IN), torch.randn(32, OUT)
    for columns in ([0, 1], [2, 3]):
        leaf.move(Part(1, columns))
        optimizer = torch.optim.AdamW([leaf.leaf], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
            write_back([leaf])
    assert leaf.leaf is same
    assert torch.equal(layer.weight[:, 2:4], leaf.leaf)
    assert (layer.weight[:, :4] != before.weight[:, :4]).all()
    assert torch.equal(layer.weight[:, 4:], before.weight[:, 4:])


def test_a_leaf_keeps_its_shape():
    layer, _ = pair("Linear")
    leaf = PartLeaf(layer, "weight", Part(1, [0, 1]))
    with pytest.raises(ValueError, match=r"shape \(10, 2\) cannot become a part of shape \(10, 1\)"):
        leaf.move(Part(1, [0]))
    with pytest.raises(ValueError, match="dimension 0"):
        leaf.move(Part(0, [0, 1]))


def test_state_is_the_modules_own_and_reaches_the_leaf():
    layer, whole = pair("Linear")
    model = nn.Sequential(nn.Identity(), layer)
    keys = list(model.state_dict())
    rows, columns = PartLeaf(layer, "weight", Part(0, [2])), PartLeaf(layer, "weight", Part(1, [1]))
    assert list(model.state_dict()) == keys
    assert {name for name, _ in model.named_parameters()} == {*keys, "1.weight_part0", "1.weight_part1"}
    state = {f"1.{name}": value + 1 for name, value in whole.state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert torch.equal(rows.leaf[0], state["1.weight"][2])
    assert torch.equal(columns.leaf[:, 0], state["1.weight"][:, 1])
    assert list(state) == keys  # what was given is left as it was
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        model.load_state_dict({"1.weight": state["1.weight"]})


def test_a_copy_is_of_its_own():
    layer, _ = pair("Linear")
    leaf = PartLeaf(layer, "weight", Part(1, [0]))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    x = torch.ones(1, IN, dtype=torch.float64)
    assert torch.equal(other(x)[0], other.bias)
    other(x).sum().backward()
    assert leaf.leaf.grad is None
    assert other.weight_part1.grad is not None


def test_nothing_is_left_behind():
    layer, _ = pair("Linear")
    layer.forward = own = layer.forward  # somebody else's, on the instance
    before = {key: copy.copy(value) for key, value in vars(layer).items()}
    leaves = [PartLeaf(layer, "weight", Part(1, [0])), PartLeaf(layer, "weight", Part(0, [0]))]
    assert leaves_of(layer) == {"weight_part1": "weight", "weight_part0": "weight"}
    for leaf in leaves:
        leaf.detach()
    assert vars(layer) == before
    assert layer.forward is own
    assert not leaves_of(layer)


# -- sharded ----------------------------------------------------------------------------------------------------------


def sharded(rank: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """One FSDP2 step and a move for each kind of part; the weight before and after, the leaf's gradient and values."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():  # else by a test before: the pair is warm, and its group stays
        dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    answers = {}
    kinds = {**PARTS, "three experts": Part(0, [4, 0, 3])}
    for name, part in kinds.items():
        layer, _ = pair("Linear", torch.float32)
        layer = experts("mixtral", "grouped_mm") if name == "three experts" else layer.requires_grad_(False)
        weight = "gate_up_proj" if name == "three experts" else "weight"
        leaf = PartLeaf(layer, weight, part)
        fully_shard(layer, mesh=mesh)
        torch.manual_seed(5)
        x = torch.randn(8, 32 if name == "three experts" else IN)[4 * rank : 4 * rank + 4]
        optimizer = torch.optim.SGD([leaf.leaf], lr=0.5)
        chosen = (torch.arange(8)[:, None] % 5)[4 * rank : 4 * rank + 4], torch.ones(4, 1)
        (layer(x, *chosen) if name == "three experts" else layer(x)).square().sum().backward()
        grad = leaf.leaf.grad.full_tensor()
        optimizer.step()
        write_back([leaf])
        stepped = layer.state_dict()[weight].full_tensor()
        size = leaf.weight.shape.numel() if part.dim is None else leaf.weight.shape[part.dim]
        leaf.move(Part(part.dim, (part.index + 1) % size))
        moved = leaf.leaf.full_tensor()
        layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()})
        answers[name] = (grad, stepped, moved, leaf.leaf.full_tensor())
    return answers


def test_sharded_parts_are_those_of_one_process():
    first, second = run_on_two(sharded)
    for name, part in {**PARTS, "three experts": Part(0, [4, 0, 3])}.items():
        fused = name == "three experts"
        layer = experts("mixtral", "grouped_mm") if fused else pair("Linear", torch.float32)[1]
        weight = layer.gate_up_proj if fused else layer.weight
        weight.requires_grad_(True)
        torch.manual_seed(5)
        x = torch.randn(8, 32 if fused else IN)
        chosen = (torch.arange(8)[:, None] % 5, torch.ones(8, 1))
        y = layer(x, *chosen) if fused else layer(x)
        (y.square().sum() / 2).backward()  # FSDP2 takes the mean over ranks
        expected = weight.detach().clone()
        part.put_(expected, part.take(expected) - 0.5 * part.take(weight.grad))
        size = weight.numel() if part.dim is None else weight.shape[part.dim]
        further = Part(part.dim, (part.index + 1) % size)
        for grad, stepped, moved, loaded in (first[name], second[name]):
            torch.testing.assert_close(grad, part.take(weight.grad), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(moved, further.take(stepped))
            assert torch.equal(loaded, 2 * moved)
