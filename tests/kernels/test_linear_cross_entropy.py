"""`linear_cross_entropy` against whole logits in float64: no worse than plain torch in the dtype that is tested."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.kernels import Rows, linear_cross_entropy, weighted_linear_cross_entropy
from lightning_peft.kernels.chunked_cross_entropy import ROW_BLOCK
from tests.kernels.truth import IGNORED, INPUTS, PER_ROW, Problem, make_problem, no_worse

BACKENDS = ("torch", "reference")
STATISTICS = ("lse", "entropy", "is_argmax")
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0, "bias": True},
    "scale": {"logit_scale": 0.25},
    "all": {"bias": True, "softcap": 6.0, "logit_scale": 0.7},
    "one row": {"n": 1},
    "large logits": {"spread": 4.0, "bias": True},  # up to about +-60
    "softcap and large logits": {"spread": 4.0, "softcap": 30.0},
}


def ours(problem: Problem, trained=INPUTS, backend="torch", chunk_rows=2, **kwargs) -> dict[str, torch.Tensor]:
    leaves = problem.leaves(trained)
    made = linear_cross_entropy(
        leaves["hidden"],
        leaves["weight"],
        problem.labels,
        leaves["bias"],
        **problem.settings,
        backend=backend,
        chunk_rows=chunk_rows,
        statistics=STATISTICS,
        **kwargs,
    )._asdict()
    found = {f"d_{name}": grad for name, grad in problem.gradients(made, leaves).items()}
    for name, grad in found.items():
        assert grad.dtype == getattr(problem, name[2:]).dtype
    return {**{name: x.detach() for name, x in made.items()}, **found}


def check(problem: Problem, dtype: torch.dtype, trained=INPUTS, **kwargs) -> None:
    truth, plain = problem.plain(torch.float64, trained), problem.plain(dtype, trained)
    found = ours(problem, trained, **kwargs)
    no_worse(found, plain, truth, dtype)
    assert {name for name in truth if name.startswith("d_")} == {name for name in found if name.startswith("d_")}
    if dtype == torch.float32:
        assert torch.equal(found["is_argmax"], truth["is_argmax"])


class Recorder(TorchDispatchMode):
    """What each operation made: its name and the shapes of its results."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.made += [(func._schema.name, tuple(x.shape)) for x in results if isinstance(x, torch.Tensor)]
        return result

    def products(self) -> list[tuple[int, ...]]:
        return [shape for name, shape in self.made if name in ("aten::mm", "aten::addmm", "aten::addmm_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("upstream", [("nll",), PER_ROW], ids="+".join)
def test_values_and_all_gradients(backend, dtype, case, upstream):
    check(make_problem(dtype=dtype, **CASES[case], upstream=upstream), dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("upstream", [("nll",), ("lse",), ("entropy",), ("lse", "entropy"), PER_ROW], ids="+".join)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
def test_each_input_alone(backend, case, upstream, trained):
    if "bias" in trained and not CASES[case].get("bias"):
        pytest.skip("this case has no bias")
    check(make_problem(**CASES[case], upstream=upstream), torch.float32, trained, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
@pytest.mark.parametrize("chunk_rows", [1, 3, 100, None])
def test_however_many_logits_are_held(backend, trained, chunk_rows):
    check(make_problem(n=10, vocabulary=37, bias=True, upstream=PER_ROW), torch.float32, trained, chunk_rows=chunk_rows)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_more_rows_than_a_block(trained):
    problem = make_problem(n=2 * ROW_BLOCK + 3, width=3, vocabulary=11, upstream=PER_ROW)
    check(problem, torch.float32, trained, chunk_rows=1000)


def test_float64_stays_float64():
    check(make_problem(dtype=torch.float64, bias=True, softcap=5.0, upstream=PER_ROW), torch.float64)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_nearly_certain_token_in_bf16_keeps_its_small_gradient(trained):
    """1 - p_y must not drown in the rounding of p_y W_y: a sum over all j, then minus W_y, would lose it."""
    weight = torch.randn(50, 16).bfloat16()
    labels = torch.arange(20)
    hidden = weight[labels].clone()
    problem = Problem(hidden, weight, labels)
    problem.up["nll"] = torch.ones(20, dtype=torch.float64)
    truth = problem.plain(torch.float64, trained)
    assert truth["nll"].median() < 0.05
    scale = truth["d_hidden"].norm(dim=1)
    found, plain = (
        (made["d_hidden"].double() - truth["d_hidden"]).norm(dim=1) / scale
        for made in (ours(problem, trained), problem.plain(torch.bfloat16, trained))
    )
    assert found.median() < 1.5 * plain.median() < 0.05  # what rounding the logits costs; without care it is 0.14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
@pytest.mark.parametrize("n", [0, 5])
def test_no_row_with_a_label(backend, trained, n):
    problem = make_problem(n=n, bias=True, upstream=PER_ROW)
    problem.labels.fill_(IGNORED)
    found = ours(problem, trained, backend)
    assert all(x.shape == (n,) and not x.any() for name, x in found.items() if not name.startswith("d_"))
    assert all(x.shape == getattr(problem, name[2:]).shape and not x.any() for name, x in found.items() if "d_" in name)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_masked_vocabulary(trained):
    """A bias of -inf takes words out, also a whole tile of them; their rows of the head get no gradient."""
    problem = make_problem(n=6, vocabulary=40, bias=True, upstream=PER_ROW)
    problem.bias[:15] = problem.bias[30:] = -torch.inf
    problem.labels = torch.randint(15, 30, (6,))
    found = ours(problem, trained)
    inside = Problem(problem.hidden, problem.weight[15:30], problem.labels - 15, problem.bias[15:30], upstream=PER_ROW)
    inside.up = problem.up
    truth = inside.plain(torch.float64, trained)
    for name, exact in truth.items():
        part = found[name][15:30] if name in ("d_weight", "d_bias") else found[name]
        torch.testing.assert_close(part.double(), exact.double(), rtol=1e-5, atol=1e-5)
    if "weight" in trained:
        assert not found["d_weight"][:15].any()
        assert not found["d_weight"][30:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_weight_gets_both_contributions(backend):
    table, ids, labels = torch.randn(23, 8), torch.randint(23, (6,)), torch.randint(23, (6,))
    up = torch.randn(6, dtype=torch.float64)

    def loss(w):
        rows = torch.tanh(F.embedding(ids, w))
        if w.dtype == torch.float64:
            return (F.cross_entropy(rows @ w.T, labels, reduction="none") * up).sum()
        return (linear_cross_entropy(rows, w, labels, backend=backend, chunk_rows=2) * up.float()).sum()

    exact, found = (torch.func.grad(loss)(table.double()), None)
    w = table.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_autocast(backend, trained, rows_dtype):
    """fp32 parameters, products in bf16, gradients in the parameters' dtype; the backward runs outside autocast."""
    problem = make_problem(bias=True, upstream=PER_ROW)
    problem.hidden = problem.hidden.to(rows_dtype)
    truth, plain = problem.plain(torch.float64, trained), problem.plain(torch.bfloat16, trained)
    leaves = problem.leaves(trained)
    with torch.autocast("cpu", torch.bfloat16):
        made = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], problem.labels, leaves["bias"],
            backend=backend, chunk_rows=2, statistics=STATISTICS,
        )._asdict()  # fmt: skip
    assert all(made[name].dtype == torch.float32 for name in PER_ROW)
    grads = problem.gradients(made, leaves)
    assert {name: x.dtype for name, x in grads.items()} == {name: getattr(problem, name).dtype for name in grads}
    found = {**{k: v.detach() for k, v in made.items()}, **{f"d_{k}": v for k, v in grads.items()}}
    no_worse(found, plain, truth, torch.bfloat16)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_no_gradient_is_made_where_none_is_wanted(trained):
    n, width, vocabulary = 6, 5, 31
    leaves = make_problem(n, width, vocabulary).leaves(trained)
    labels = torch.randint(vocabulary, (n,))
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, Recorder() as seen:
            assert not linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, chunk_rows=2).requires_grad
            loss, _ = weighted_linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, chunk_rows=2)
            assert not loss.requires_grad
        # Each logit once a call, and no product as wide as the hidden states.
        assert sum(rows * columns for rows, columns in seen.products()) == 2 * n * vocabulary
        assert all(columns != width for _, columns in seen.products())


def test_a_frozen_head_costs_no_gradient_of_the_head():
    n, width, vocabulary = 9, 8, 31
    leaves, labels = make_problem(n, width, vocabulary).leaves(("hidden",)), torch.randint(vocabulary, (n,))
    with Recorder() as seen:
        linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, chunk_rows=2).sum().backward()
    assert sum(rows * columns for rows, columns in seen.products() if columns != width) == n * vocabulary
    assert not [name for name, shape in seen.made if shape == (vocabulary, width)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_nothing_of_the_logits_size_is_ever_made(backend, trained):
    n, vocabulary = 64, 300
    problem = make_problem(n, 8, vocabulary, bias=True, softcap=5.0, upstream=PER_ROW)
    with Recorder() as seen:
        ours(problem, trained, backend, chunk_rows=5)
        if backend == "torch":
            leaves = problem.leaves(trained)
            weighted_linear_cross_entropy(
                leaves["hidden"], leaves["weight"], problem.labels, lambda rows: -rows.nll, chunk_rows=5
            )[0].backward()
    assert max(torch.Size(shape).numel() for _, shape in seen.made) <= max(5 * vocabulary, vocabulary * 8)


# Derivatives of derivatives, and forward mode.


def test_the_reference_differentiates_twice():
    problem = make_problem(n=4, width=3, vocabulary=6, bias=True, dtype=torch.float64, softcap=3.0)
    leaves = list(problem.leaves().values())

    def f(h, w, b):
        made = linear_cross_entropy(
            h, w, problem.labels, b, softcap=3.0, backend="reference", chunk_rows=3, statistics=["lse", "entropy"]
        )
        return made.nll, made.lse, made.entropy

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("upstream", PER_ROW)
def test_a_second_derivative_elsewhere_raises_and_names_the_reference(trained, upstream):
    problem = make_problem(bias=True, upstream=(upstream,))
    leaves = problem.leaves(trained)
    made = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], problem.labels, leaves["bias"], statistics=STATISTICS, backend="torch"
    )._asdict()
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    grads = torch.autograd.grad(made[upstream].square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_second_derivative_of_the_weighted_sum_raises(trained):
    problem = make_problem()
    leaves = problem.leaves(trained)
    loss, _ = weighted_linear_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels, lambda rows: rows.nll)
    (grad,) = torch.autograd.grad(loss.square(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_weights_that_come_from_a_network_get_their_gradient():
    problem = make_problem()
    leaves, weights = problem.leaves(), torch.rand(7, requires_grad=True)
    nll = linear_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels)
    (weights * nll).sum().backward()
    torch.testing.assert_close(weights.grad, nll.detach())


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("along", [INPUTS, ("hidden",), ("weight",), ("bias",)], ids="+".join)
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_forward_mode_equals_that_of_the_reference(case, along, chunk_rows):
    problem = make_problem(dtype=torch.float64, **{**CASES[case], "bias": True})
    inputs = [problem.hidden, problem.weight, problem.bias]
    dots = [torch.randn_like(x) if name in along else torch.zeros_like(x) for name, x in zip(INPUTS, inputs)]

    def f(h, w, b, backend):
        made = linear_cross_entropy(
            h, w, problem.labels, b, **problem.settings,
            backend=backend, chunk_rows=chunk_rows, statistics=["lse", "entropy"],
        )  # fmt: skip
        return made[:3]

    values, expected = torch.func.jvp(lambda *x: f(*x, "reference"), tuple(inputs), tuple(dots))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, d) if name in along else x for name, x, d in zip(INPUTS, inputs, dots)]
        found = [forward_ad.unpack_dual(x) for x in f(*dual, "torch")]
        for (value, tangent), exact, exact_tangent in zip(found, values, expected):
            torch.testing.assert_close(value, exact)
            torch.testing.assert_close(tangent, exact_tangent)


def test_forward_mode_gives_the_meta_gradient_of_one_step():
    """theta' = theta - a sum_t w_t grad nll_t; dL(theta')/dw_t = -a <grad nll_t, grad L> = -a JVP[nll_t](grad L)."""
    rate, problem, later = 0.1, make_problem(dtype=torch.float64), make_problem(dtype=torch.float64)
    w = torch.rand(7, dtype=torch.float64, requires_grad=True)
    head = problem.weight.clone().requires_grad_()
    nll = linear_cross_entropy(problem.hidden, head, problem.labels, backend="reference")
    (inner,) = torch.autograd.grad((w * nll).sum(), head, create_graph=True)
    loss = linear_cross_entropy(later.hidden, head - rate * inner, later.labels, backend="reference").sum()
    (expected,) = torch.autograd.grad(loss, w)
    assert expected.abs().max() > 1e-3

    moved = (problem.weight - rate * inner.detach()).requires_grad_()
    (outer,) = torch.autograd.grad(linear_cross_entropy(later.hidden, moved, later.labels).sum(), moved)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(problem.weight, outer)
        nll_dot = forward_ad.unpack_dual(linear_cross_entropy(problem.hidden, dual, problem.labels)).tangent
    torch.testing.assert_close(-rate * nll_dot, expected)


def test_forward_mode_and_backward_together_raise_and_name_the_reference():
    problem = make_problem()
    leaves = problem.leaves()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves["hidden"], torch.randn_like(problem.hidden))
        nll = linear_cross_entropy(dual, leaves["weight"], problem.labels)
        with pytest.raises(RuntimeError, match="backend='reference'"):  # its tangent would be missing
            torch.autograd.grad(nll.sum(), leaves["weight"], retain_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(forward_ad.unpack_dual(nll).tangent.sum(), leaves["weight"])


# A rule for the weights.


def distrust(rows: Rows) -> torch.Tensor:
    """Of both signs, zero for some, and different for each row and label."""
    return torch.where(rows.index % 3 == 0, 0.0, (-rows.nll).exp() - 0.1 * rows.entropy + 0.01 * rows.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "all", "large logits"])
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",), ("weight",), ("bias",)], ids="+".join)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_rule_equals_weighting_the_rows(dtype, case, trained, scaled):
    problem = make_problem(n=8, dtype=dtype, **{**CASES[case], "bias": True})
    scale = torch.randn(8) if scaled else None

    def plainly(dtype):
        made = problem.plain(dtype, trained)
        weights = distrust(Rows(made["nll"], made["entropy"], None, problem.labels, torch.arange(8)))
        made["weights"] = torch.where(problem.labels == IGNORED, 0.0, weights)
        problem.up["nll"] = 2.5 * made["weights"].double() * (1.0 if scale is None else scale.double())
        return {
            **problem.plain(dtype, trained),
            "weights": made["weights"],
            "loss": (problem.up["nll"] * made["nll"]).sum(),
        }

    truth, plain = plainly(torch.float64), plainly(dtype)

    leaves = problem.leaves(trained)
    loss, made = weighted_linear_cross_entropy(
        leaves["hidden"], leaves["weight"], problem.labels, distrust, leaves["bias"],
        scale=scale, **problem.settings, chunk_rows=3, statistics=["entropy", "is_argmax"],
    )  # fmt: skip
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(2.5 * loss, list(wanted.values()))
    found = {f"d_{name}": grad for name, grad in zip(wanted, grads)}
    no_worse({**made._asdict(), **found, "loss": 2.5 * loss.detach()}, plain, truth, dtype)
    assert not any(x is not None and x.requires_grad for x in made)


def test_without_a_rule_it_is_the_sum():
    problem = make_problem(n=8)
    leaves = problem.leaves()
    loss, made = weighted_linear_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels)
    torch.testing.assert_close(loss, linear_cross_entropy(problem.hidden, problem.weight, problem.labels).sum())
    assert made.entropy is None
    assert made.is_argmax is None
    assert made.weights.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_graph_that_is_kept_gives_the_same_gradient_again(trained):
    problem = make_problem()
    leaves = problem.leaves(trained)
    loss, _ = weighted_linear_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels, lambda rows: rows.nll)
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    first = torch.autograd.grad(3.0 * loss, wanted, retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, wanted)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
@pytest.mark.parametrize("n", [0, 4])
def test_a_rule_over_no_row(trained, n):
    problem = make_problem(n=n)
    problem.labels.fill_(IGNORED)
    leaves = problem.leaves(trained)
    loss, made = weighted_linear_cross_entropy(
        leaves["hidden"], leaves["weight"], problem.labels, lambda rows: rows.nll
    )
    loss.backward()
    assert loss.item() == 0
    assert made.nll.shape == made.weights.shape == (n,)
    assert not leaves["hidden"].grad.any()


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_rule_under_bf16_autocast(trained):
    problem = make_problem(bias=True)
    truth, plain = problem.plain(torch.float64, trained), problem.plain(torch.bfloat16, trained)
    leaves = problem.leaves(trained)
    scale = problem.up["nll"].float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_linear_cross_entropy(
            leaves["hidden"], leaves["weight"], problem.labels, None, leaves["bias"], scale=scale, chunk_rows=3
        )
    loss.backward()
    found = {f"d_{name}": leaves[name].grad for name in trained}
    assert all(grad.dtype == torch.float32 for grad in found.values())
    no_worse(found, plain, truth, torch.bfloat16)


# What does not fit.

HIDDEN, WEIGHT, LABELS = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 5, IGNORED, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([0, 6, 1, 1])}, r"label 6 is outside \[0, 6\)"),
        ({"labels": torch.tensor([0, -1, 1, 1])}, r"label -1 is outside .* ignore_index=-100"),
        ({"labels": LABELS, "ignore_index": -1}, "label -100 is outside"),
        ({"labels": LABELS.int()}, "must be int64"),
        ({"labels": LABELS[:3]}, r"labels have shape \(3,\), expected \(4,\)"),
        ({"hidden": HIDDEN[None], "labels": LABELS[None]}, "Flatten batch and time"),
        ({"hidden": torch.randn(4, 2)}, "hidden has width 2 and weight 3"),
        ({"weight": torch.ones(6, 3, dtype=torch.int8)}, "Dequantise"),
        ({"weight": WEIGHT.bfloat16()}, "cast one of them, or use autocast"),
        ({"bias": torch.randn(5)}, r"bias has shape \(5,\), expected \(6,\)"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"chunk_rows": 0}, "chunk_rows=0 must be at least 1"),
        ({"statistics": ["perplexity"]}, r"known are \['entropy', 'is_argmax', 'lse'\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **arguments})


def test_what_does_not_fit_a_rule_is_refused():
    with pytest.raises(ValueError, match="no 'reference' backend"):
        weighted_linear_cross_entropy(HIDDEN, WEIGHT, LABELS, backend="reference")
    with pytest.raises(ValueError, match=r"statistics=\['lse'\]"):
        weighted_linear_cross_entropy(HIDDEN, WEIGHT, LABELS, statistics=["lse"])
    for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"rule gave weights of shape \(1,\) for rows of shape \(3,\)"):
            weighted_linear_cross_entropy(HIDDEN, weight, LABELS, lambda rows: rows.nll[:1])


def test_a_sharded_weight_is_refused():
    from torch import distributed
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(WEIGHT, DeviceMesh("cpu", [0]), [Replicate()])
        with pytest.raises(ValueError, match=r"full_tensor\(grad_placements="):
            linear_cross_entropy(HIDDEN, sharded, LABELS)
    finally:
        distributed.destroy_process_group()
