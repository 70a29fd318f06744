"""`linear_kl` against `F.kl_div` of whole logits in float64: no worse than plain torch in the dtype that is tested."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import linear_kl
from lightning_peft.kernels.chunked_cross_entropy import ROW_BLOCK
from tests.kernels.test_linear_cross_entropy import Recorder
from tests.kernels.truth import INPUTS, no_worse

BACKENDS = ("torch", "reference")
DIRECTIONS = ("forward", "reverse")
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 2.5},
    "all": {"bias": True, "softcap": 6.0, "logit_scale": 0.7, "temperature": 0.6},
    "one row": {"n": 1},
    "no row": {"n": 0},
    "large logits": {"spread": 4.0, "bias": True},  # up to about +-60
}


@dataclass
class Pair:
    """A student and a reference of another width, with upstream gradients of both signs."""

    given: dict[str, Tensor | None]
    settings: dict

    def leaves(self, trained=INPUTS, dtype=None) -> dict[str, Tensor | None]:
        return {
            name: None if x is None else x.to(dtype or x.dtype, copy=True).requires_grad_(name in trained)
            for name, x in self.given.items()
        }

    def gradients(self, kl: Tensor, leaves, up: Tensor) -> dict[str, Tensor]:
        wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
        grads = torch.autograd.grad((kl * up.to(kl.dtype)).sum(), list(wanted.values()))
        return {"kl": kl.detach(), **{f"d_{name}": grad for name, grad in zip(wanted, grads)}}

    def plain(self, dtype, direction, trained=INPUTS) -> dict[str, Tensor]:
        leaves = self.leaves(trained, dtype)

        def log_p(suffix):
            z = F.linear(leaves[f"hidden{suffix}"], leaves[f"weight{suffix}"], leaves[f"bias{suffix}"])
            z = z * self.settings.get("logit_scale", 1.0)
            if cap := self.settings.get("softcap"):
                z = cap * torch.tanh(z / cap)
            z = z if dtype == torch.float64 else z.float()
            return (z / self.settings.get("temperature", 1.0)).log_softmax(1)

        of, to = (log_p("_ref"), log_p("")) if direction == "forward" else (log_p(""), log_p("_ref"))
        return self.gradients(F.kl_div(to, of, log_target=True, reduction="none").sum(1), leaves, self.up)

    def ours(self, direction, trained=INPUTS, chunk_rows=4, backend="torch") -> dict[str, Tensor]:
        leaves = self.leaves(trained)
        kl = linear_kl(**leaves, **self.settings, direction=direction, chunk_rows=chunk_rows, backend=backend)
        assert kl.dtype == torch.float32 or self.given["hidden"].dtype == torch.float64
        return self.gradients(kl, leaves, self.up)


def make_pair(n=7, vocabulary=53, bias=False, dtype=torch.float32, spread=1.0, **settings) -> Pair:
    width, width_ref = 12, 9
    pair = Pair(
        {
            "hidden": torch.randn(n, width).mul_(spread).to(dtype),
            "weight": torch.randn(vocabulary, width).to(dtype),
            "hidden_ref": torch.randn(n, width_ref).mul_(spread).to(dtype),
            "weight_ref": torch.randn(vocabulary, width_ref).to(dtype),
            "bias": torch.randn(vocabulary).to(dtype) if bias else None,
            "bias_ref": torch.randn(vocabulary).to(dtype) if bias else None,
        },
        settings,
    )
    pair.up = torch.randn(n, dtype=torch.float64)
    if n > 2:
        pair.up[1] = 0.0
    return pair


def check(pair: Pair, direction, trained=INPUTS, **kwargs):
    dtype = pair.given["hidden"].dtype
    truth, plain = (pair.plain(d, direction, trained) for d in (torch.float64, dtype))
    found = pair.ours(direction, trained, **kwargs)
    assert set(found) == set(truth)
    no_worse(found, plain, truth, dtype, size=max([1.0, *truth["kl"].abs().tolist()]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",), ("weight",)], ids="+".join)
def test_values_and_gradients(backend, direction, dtype, case, trained):
    check(make_pair(dtype=dtype, **CASES[case]), direction, trained, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_bias_alone(backend, direction):
    check(make_pair(bias=True), direction, ("bias",), backend=backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
@pytest.mark.parametrize("chunk_rows", [1, 3, 100, None])
def test_however_many_logits_are_held(direction, trained, chunk_rows):
    check(make_pair(n=10, vocabulary=37, bias=True), direction, trained, chunk_rows=chunk_rows)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_rows_than_a_block_and_float64(direction):
    check(make_pair(n=ROW_BLOCK + 3, vocabulary=11, dtype=torch.float64), direction, chunk_rows=500)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_both_sides_the_same_is_exactly_zero(direction, dtype, trained):
    pair = make_pair(bias=True, dtype=dtype, softcap=5.0, temperature=0.7)
    for name in INPUTS:
        pair.given[f"{name}_ref"] = pair.given[name]
    assert not any(x.any() for x in pair.ours(direction, trained).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_gets_no_gradient(backend):
    names = ("hidden_ref", "weight_ref", "bias_ref")
    leaves = make_pair(bias=True).leaves((*INPUTS, *names))
    linear_kl(**leaves, backend=backend).sum().backward()
    assert all(leaves[name].grad is None for name in names)
    assert all(leaves[name].grad.any() for name in INPUTS)


def test_one_table_may_be_both_heads():
    """The same tensor on both sides is a constant on the reference's."""
    pair = make_pair()
    weight = pair.given["weight"].clone().requires_grad_()
    hidden = pair.given["hidden"]
    linear_kl(hidden, weight, hidden + 0.1, weight).sum().backward()
    expected = weight.detach().clone().requires_grad_()
    linear_kl(hidden, expected, hidden + 0.1, weight.detach()).sum().backward()
    assert torch.equal(weight.grad, expected.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_bf16_autocast(backend, direction, trained):
    pair = make_pair(bias=True)
    truth, plain = (pair.plain(dtype, direction, trained) for dtype in (torch.float64, torch.bfloat16))
    leaves = pair.leaves(trained)
    with torch.autocast("cpu", torch.bfloat16):
        kl = linear_kl(**leaves, direction=direction, chunk_rows=4, backend=backend)
    found = pair.gradients(kl, leaves, pair.up)
    assert all(x.dtype == torch.float32 for x in found.values())
    no_worse(found, plain, truth, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_vocabulary_that_both_mask_counts_without_what_is_masked(backend, direction):
    pair = make_pair(bias=True)
    for name in ("bias", "bias_ref"):
        pair.given[name][20:] = -torch.inf
    found = pair.ours(direction, backend=backend)
    for name in ("weight", "weight_ref", "bias", "bias_ref"):
        pair.given[name] = pair.given[name][:20]
    expected = pair.plain(torch.float64, direction)
    for name, value in found.items():
        kept = value[:20] if name in ("d_weight", "d_bias") else value
        torch.testing.assert_close(kept.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_reference_in_another_dtype():
    pair = make_pair()
    whole = pair.plain(torch.float64, "reverse")["kl"]
    for name in ("hidden_ref", "weight_ref"):
        pair.given[name] = pair.given[name].bfloat16()
    torch.testing.assert_close(pair.ours("reverse")["kl"].double(), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_no_gradient_is_made_where_none_is_wanted(direction, trained):
    n, vocabulary = 6, 31
    leaves = make_pair(n, vocabulary).leaves(trained)
    with torch.no_grad(), Recorder() as seen:
        assert not linear_kl(**leaves, direction=direction, chunk_rows=4).requires_grad
    assert sum(rows * columns for rows, columns in seen.products()) == 2 * n * vocabulary


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_nothing_of_the_logits_size_is_ever_made(backend, direction, trained):
    n, vocabulary = 64, 300
    pair = make_pair(n, vocabulary, bias=True, softcap=5.0)
    with Recorder() as seen:
        pair.ours(direction, trained, chunk_rows=10, backend=backend)
    assert max(torch.Size(shape).numel() for _, shape in seen.made) <= vocabulary * 12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reference_backend_differentiates_twice(direction):
    pair = make_pair(n=4, vocabulary=5, bias=True, dtype=torch.float64, softcap=3.0, temperature=0.8)
    leaves = pair.leaves()

    def kl(hidden, weight, bias):
        given = {**leaves, "hidden": hidden, "weight": weight, "bias": bias}
        return linear_kl(**given, **pair.settings, direction=direction, backend="reference", chunk_rows=4)

    inputs = [leaves[name] for name in INPUTS]
    assert torch.autograd.gradcheck(kl, inputs)
    assert torch.autograd.gradgradcheck(kl, inputs)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",), ("weight",)], ids="+".join)
def test_a_second_derivative_elsewhere_raises_and_names_the_reference(direction, trained):
    leaves = make_pair(bias=True).leaves(trained)
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    grads = torch.autograd.grad(linear_kl(**leaves, direction=direction).sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "both"}, "KL\\(reference \\|\\| student\\)"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"hidden_ref": torch.randn(3, 9)}, "as many rows"),
        ({"weight_ref": torch.randn(5, 9)}, "same vocabulary"),
        ({"hidden_ref": torch.randn(7, 8)}, "hidden_ref has width 8 and weight_ref 9"),
        ({"weight_ref": torch.ones(53, 9, dtype=torch.int8)}, "weight_ref torch.int8: both must be floating"),
        ({"bias_ref": torch.randn(3)}, r"bias_ref has shape \(3,\)"),
        ({"hidden": torch.randn(7, 12).bfloat16()}, "use autocast"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**make_pair().given, **arguments})
