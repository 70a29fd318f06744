"""The Triton kernels in Triton's interpreter, on CPU tensors: small, since each block is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.kernels import linear_cross_entropy, weighted_linear_cross_entropy
from tests.kernels.test_linear_cross_entropy import CASES, STATISTICS, check, distrust, ours
from tests.kernels.truth import IGNORED, INPUTS, PER_ROW, make_problem, no_worse

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is switched off"),
    # numpy warns of exp(large) = inf and of masked lanes, which the kernels mean
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_values_and_gradients(dtype, case, trained):
    problem = make_problem(vocabulary=100, dtype=dtype, **CASES[case], upstream=PER_ROW)
    check(problem, dtype, trained, backend="triton", chunk_rows=3)


@pytest.mark.parametrize("upstream", PER_ROW)
@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("hidden",)], ids="+".join)
def test_each_input_and_output_alone(upstream, trained):
    check(make_problem(**CASES["all"], upstream=(upstream,)), torch.float32, trained, backend="triton", chunk_rows=100)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_several_blocks_of_rows_and_splits_of_the_vocabulary(trained):
    """Neither N, nor V, nor H is a multiple of a block; more tiles than splits, so some programs go over two."""
    problem = make_problem(n=70, width=40, vocabulary=330, bias=True, upstream=PER_ROW)
    check(problem, torch.float32, trained, backend="triton", chunk_rows=40)


def test_rows_and_heads_that_are_not_contiguous():
    problem = make_problem()
    problem.hidden = torch.randn(24, 14).t()[::2]
    problem.weight = torch.randn(24, 53).t()
    assert not problem.hidden.is_contiguous()
    assert not problem.weight.is_contiguous()
    check(problem, torch.float32, backend="triton")
    problem.weight = torch.randn(53, 48)[:, :24]
    check(problem, torch.float32, backend="triton")


@pytest.mark.parametrize("n", [0, 5])
def test_no_row_with_a_label(n):
    problem = make_problem(n=n, bias=True, upstream=PER_ROW)
    problem.labels.fill_(IGNORED)
    found = ours(problem, INPUTS, "triton")
    assert not any(x.any() for x in found.values())
    assert found["nll"].shape == (n,)


def test_a_masked_vocabulary_wider_than_a_tile():
    problem = make_problem(n=3, vocabulary=200, bias=True, upstream=PER_ROW)
    problem.bias[:130] = -torch.inf
    problem.labels = torch.randint(130, 200, (3,))
    expected = ours(problem, INPUTS, "torch")
    for name, found in ours(problem, INPUTS, "triton").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_rule(trained):
    problem = make_problem(n=8, **CASES["all"])
    scale = torch.randn(8)

    def run(backend):
        leaves = problem.leaves(trained)
        loss, made = weighted_linear_cross_entropy(
            leaves["hidden"], leaves["weight"], problem.labels, distrust, leaves["bias"],
            scale=scale, **problem.settings, backend=backend, chunk_rows=5, statistics=["entropy", "is_argmax"],
        )  # fmt: skip
        return [loss, *made, *torch.autograd.grad(loss, [x for x in leaves.values() if x.requires_grad])]

    for found, expected in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_bf16_autocast(trained):
    problem = make_problem(bias=True, upstream=PER_ROW)
    truth, plain = problem.plain(torch.float64, trained), problem.plain(torch.bfloat16, trained)
    leaves = problem.leaves(trained)
    with torch.autocast("cpu", torch.bfloat16):
        made = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], problem.labels, leaves["bias"], backend="triton", statistics=STATISTICS
        )._asdict()
    grads = problem.gradients(made, leaves)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    found = {**{k: v.detach() for k, v in made.items()}, **{f"d_{k}": v for k, v in grads.items()}}
    no_worse(found, plain, truth, torch.bfloat16)


def test_a_second_derivative_raises_and_names_the_reference():
    leaves = make_problem().leaves()
    nll = linear_cross_entropy(leaves["hidden"], leaves["weight"], torch.arange(7), backend="triton")
    (grad,) = torch.autograd.grad(nll.sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_forward_mode():
    problem = make_problem(bias=True, softcap=5.0)
    dots = [torch.randn_like(problem.hidden), torch.randn_like(problem.weight)]

    def nll(h, w, backend):
        return linear_cross_entropy(h, w, problem.labels, problem.bias, softcap=5.0, backend=backend)

    _, expected = torch.func.jvp(lambda h, w: nll(h, w, "reference"), (problem.hidden, problem.weight), tuple(dots))
    with torch.autograd.forward_ad.dual_level():
        dual = (torch.autograd.forward_ad.make_dual(*pair) for pair in zip((problem.hidden, problem.weight), dots))
        found = torch.autograd.forward_ad.unpack_dual(nll(*dual, "triton")).tangent
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="use backend='torch'"):
        linear_cross_entropy(torch.ones(1, 2).double(), torch.ones(3, 2).double(), torch.tensor([0]), backend="triton")


def python(code: str, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **env},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_peft.kernels import linear_cross_entropy
from lightning_peft.kernels.triton_cross_entropy import TritonLogits, _gradient_kernel, _statistics_kernel

try:
    linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="triton")
    raise AssertionError("ran on CPU tensors")
except ValueError as refused:
    assert "backend='torch'" in str(refused), refused

settings = TritonLogits(30.0, 1.0, torch.bfloat16, 1, 1)._settings(torch.ones(1))
warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
integers = ("n", "v", "width", "first", "h_stride", "w_stride", "tiles")
kinds = {"h": "*bf16", "w": "*bf16", "b": "*bf16", "dz": "*bf16", "y": "*i64", "scale": "fp32", "softcap": "fp32"}
for kernel, flags in (
    (_statistics_kernel, {"ENTROPY": True, "KEEP": True}),
    (_gradient_kernel, {"KEPT": False, "LABELLED": True, "ENTROPY": True}),
):
    fixed = {**settings, **flags}
    signature = {
        name: "constexpr" if name in fixed else "i32" if name in integers else kinds.get(name, "*fp32")
        for name in kernel.arg_names
    }
    target = GPUTarget("cuda", 80, 32)
    made = triton.compile(ASTSource(kernel, signature, fixed), target, {"num_warps": warps, "num_stages": stages})
    assert "mma.sync" in made.asm["ptx"]  # the tensor cores are used
    assert made.metadata.shared < 99 * 1024  # what every GPU from Ampere on has
print("ok")
"""


def test_the_kernels_compile_for_a_gpu_and_refuse_a_cpu():
    """Compiles for sm_80, which needs no GPU; the interpreter would accept what a compiler does not."""
    assert python(COMPILED).splitlines()[-1] == "ok"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # cannot be imported
import torch
from lightning_peft.kernels import linear_cross_entropy
arguments = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])
linear_cross_entropy(*arguments)
try:
    linear_cross_entropy(*arguments, backend="triton")
except ImportError as missing:
    assert "package triton" in str(missing) and "'torch'" in str(missing), missing
    print("ok")
"""


def test_without_the_package_the_error_names_it():
    assert python(WITHOUT_TRITON).splitlines()[-1] == "ok"
