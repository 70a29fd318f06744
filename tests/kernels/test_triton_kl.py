"""The Triton kernels of `linear_kl` in Triton's interpreter, on CPU tensors: small, since each block is interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from lightning_peft.kernels import linear_kl
from tests.kernels.test_linear_kl import CASES, DIRECTIONS, check, make_pair
from tests.kernels.test_triton_cross_entropy import python
from tests.kernels.truth import INPUTS, no_worse

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is switched off"),
    # numpy warns of exp(large) = inf and of masked lanes, which the kernels mean
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_values_and_gradients(direction, dtype, case, trained):
    check(make_pair(dtype=dtype, **CASES[case]), direction, trained, backend="triton")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [("weight",), ("bias",)], ids="+".join)
def test_each_input_alone(direction, trained):
    check(make_pair(bias=True, softcap=5.0), direction, trained, backend="triton")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_several_blocks_of_rows_and_of_the_vocabulary(direction, trained):
    """Neither N nor V is a multiple of a block, and a row's loop goes over two."""
    check(make_pair(n=20, vocabulary=4300, bias=True), direction, trained, chunk_rows=18, backend="triton")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_both_sides_the_same_is_exactly_zero(direction, trained):
    pair = make_pair(bias=True, softcap=5.0, temperature=0.7)
    for name in INPUTS:
        pair.given[f"{name}_ref"] = pair.given[name]
    assert not any(x.any() for x in pair.ours(direction, trained, backend="triton").values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_a_masked_vocabulary(direction, trained):
    pair = make_pair(bias=True)
    for name in ("bias", "bias_ref"):
        pair.given[name][20:] = -torch.inf
    expected = pair.ours(direction, trained)
    for name, found in pair.ours(direction, trained, backend="triton").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trained", [INPUTS, ("hidden",)], ids="+".join)
def test_bf16_autocast(direction, trained):
    pair = make_pair(bias=True)
    truth, plain = (pair.plain(dtype, direction, trained) for dtype in (torch.float64, torch.bfloat16))
    leaves = pair.leaves(trained)
    with torch.autocast("cpu", torch.bfloat16):
        kl = linear_kl(**leaves, direction=direction, chunk_rows=4, backend="triton")
    no_worse(pair.gradients(kl, leaves, pair.up), plain, truth, torch.bfloat16)


def test_a_second_derivative_raises_and_names_the_reference():
    leaves = make_pair().leaves()
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    grads = torch.autograd.grad(linear_kl(**leaves, backend="triton").sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(grad.square().sum() for grad in grads).backward()


def test_float64_is_refused():
    with pytest.raises(ValueError, match="use backend='torch'"):
        linear_kl(**make_pair(dtype=torch.float64).given, backend="triton")


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_peft.kernels import linear_kl
from lightning_peft.kernels.triton_kl import _gradient_kernel, _rows_kernel

try:
    linear_kl(*(torch.ones(1, 2), torch.ones(3, 2)) * 2, backend="triton")
    raise AssertionError("ran on CPU tensors")
except ValueError as refused:
    assert "backend='torch'" in str(refused), refused

kinds = {"dz": "*bf16", "n": "i32", "v": "i32", "temperature": "fp32", "softcap": "fp32", "scale": "fp32"}
for kernel, flags in (
    (_rows_kernel, {"BLOCK": 4096, "PULLED": True}),
    (_gradient_kernel, {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}),
):
    for forward in (True, False):
        fixed = {**flags, "FORWARD": forward, "CAPPED": True}
        signature = {name: "constexpr" if name in fixed else kinds.get(name, "*fp32") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, fixed), GPUTarget("cuda", 80, 32), {"num_warps": 8})
        assert made.metadata.shared < 48 * 1024
print("ok")
"""


def test_the_kernels_compile_for_a_gpu_and_refuse_a_cpu():
    """Compiles for sm_80, which needs no GPU; the interpreter would accept what a compiler does not."""
    assert python(COMPILED).splitlines()[-1] == "ok"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # cannot be imported
import torch
from lightning_peft.kernels import linear_kl
arguments = (torch.ones(1, 2), torch.ones(3, 2)) * 2
linear_kl(*arguments)
try:
    linear_kl(*arguments, backend="triton")
except ImportError as missing:
    assert "package triton" in str(missing) and "'torch'" in str(missing), missing
    print("ok")
"""


def test_without_the_package_the_error_names_it():
    assert python(WITHOUT_TRITON).splitlines()[-1] == "ok"
