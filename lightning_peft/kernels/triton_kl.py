"""The Triton path of `linear_kl`: softmaxes, divergence and its gradient in one kernel over logits that are at hand.

The products h W^T of both heads are the BLAS library's, a chunk at a time. What torch does to a chunk in some ten
passes over memory, `_rows_kernel` does in three reads of both sides and one write; `_gradient_kernel` in one of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft.kernels.chunked_cross_entropy import Logits, Part
from lightning_peft.kernels.triton_cross_entropy import INTERPRETED, LOWEST, TritonLogits, on_device


@triton.jit
def _pull(log_p, log_q, kl, FORWARD: tl.constexpr):
    """d KL / d (z / temperature)."""
    p = tl.exp(log_p)
    if FORWARD:
        return p - tl.exp(log_q)
    return tl.where(p > 0, p * (log_p - log_q - kl), 0.0)


@triton.jit
def _softmax_parts(z, v, temperature, BLOCK: tl.constexpr):
    """The largest of a row's z / temperature, and the logarithm of the sum of exp relative to it."""
    j = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, dtype=tl.float32)  # each lane its own: one reduction at the end
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, v, BLOCK):
        x = tl.load(z + start + j, mask=start + j < v, other=float("-inf")) / temperature
        highest = tl.maximum(top, x)
        total = total * tl.exp(top - highest) + tl.exp(x - highest)
        top = highest
    highest = tl.max(top, axis=0)
    return highest, tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def _rows_kernel(
    z, z_ref, tops, logs, tops_ref, logs_ref, kls, dz, v, temperature, softcap, scale,
    BLOCK: tl.constexpr, FORWARD: tl.constexpr, PULLED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One row of both sides: its KL, the parts of its softmaxes and, if PULLED, dz."""
    row = tl.program_id(0)
    corner = row.to(tl.int64) * v
    z, z_ref, dz = z + corner, z_ref + corner, dz + corner
    j = tl.arange(0, BLOCK)
    top, log_total = _softmax_parts(z, v, temperature, BLOCK)
    top_ref, log_total_ref = _softmax_parts(z_ref, v, temperature, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, v, BLOCK):
        inside = start + j < v
        # Taken off one by one: their sum would be rounded at the logits' size, and a p near 1 with it.
        log_p = tl.load(z + start + j, mask=inside, other=float("-inf")) / temperature - top - log_total
        log_q = tl.load(z_ref + start + j, mask=inside, other=float("-inf")) / temperature - top_ref - log_total_ref
        if FORWARD:
            share, gap = tl.exp(log_q), log_q - log_p
        else:
            share, gap = tl.exp(log_p), log_p - log_q
        sums += tl.where(share > 0, share * gap, 0.0)
    kl = tl.sum(sums, axis=0)
    tl.store(tops + row, top)
    tl.store(logs + row, log_total)
    tl.store(tops_ref + row, top_ref)
    tl.store(logs_ref + row, log_total_ref)
    tl.store(kls + row, kl)
    if PULLED:
        for start in range(0, v, BLOCK):
            inside = start + j < v
            x = tl.load(z + start + j, mask=inside, other=0.0)
            log_p = x / temperature - top - log_total
            log_q = tl.load(z_ref + start + j, mask=inside, other=0.0) / temperature - top_ref - log_total_ref
            d = _pull(log_p, log_q, kl, FORWARD) / temperature
            if CAPPED:
                d *= 1 - (x / softcap) * (x / softcap)
            tl.store(dz + start + j, (d * scale).to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    z, z_ref, tops, logs, tops_ref, logs_ref, kls, g, dz, n, v, temperature, softcap, scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, FORWARD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dz of a tile of logits, with the parts of the rows' softmaxes and the upstream g known."""
    row, column = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    rows = row + i
    here = rows < n
    corner, at = row.to(tl.int64) * v + column, i[:, None] * v + j[None, :]
    inside = here[:, None] & (column + j < v)[None, :]
    x = tl.load(z + corner + at, mask=inside, other=0.0)
    x_ref = tl.load(z_ref + corner + at, mask=inside, other=0.0)
    log_p = x / temperature - tl.load(tops + rows, mask=here, other=0.0)[:, None]
    log_p -= tl.load(logs + rows, mask=here, other=0.0)[:, None]
    log_q = x_ref / temperature - tl.load(tops_ref + rows, mask=here, other=0.0)[:, None]
    log_q -= tl.load(logs_ref + rows, mask=here, other=0.0)[:, None]
    d = _pull(log_p, log_q, tl.load(kls + rows, mask=here, other=0.0)[:, None], FORWARD)
    d *= (tl.load(g + rows, mask=here, other=0.0) / temperature)[:, None]
    if CAPPED:
        d *= 1 - (x / softcap) * (x / softcap)
    tl.store(dz + corner + at, (d * scale).to(dz.dtype.element_ty), mask=inside)


def divergences_(
    z: Tensor,
    z_ref: Tensor,
    sides: Tensor,
    kl: Tensor,
    logits: Logits,
    direction: str,
    temperature: float,
    pulled: bool,
) -> Part:
    """As `linear_kl.divergences_`."""
    dz = _room(z, logits) if pulled else z
    with on_device(z):
        _rows_kernel[(len(z),)](
            z, z_ref, *sides.flatten(0, 1), kl, dz, z.shape[1], temperature, logits.softcap or 1.0, logits.scale,
            BLOCK=min(4096, triton.next_power_of_2(z.shape[1])), FORWARD=direction == "forward", PULLED=pulled,
            CAPPED=logits.softcap is not None, num_warps=8,
        )  # fmt: skip
    return dz.to(logits.dtype) if pulled else None


def gradient_(
    z: Tensor, z_ref: Tensor, sides: Tensor, kl: Tensor, g: Tensor, logits: Logits, direction: str, temperature: float
) -> Tensor:
    """As `linear_kl.gradient_`."""
    dz, (rows, columns) = _room(z, logits), (16, 256)
    with on_device(z):
        _gradient_kernel[(triton.cdiv(z.shape[0], rows), triton.cdiv(z.shape[1], columns))](
            z, z_ref, *sides.flatten(0, 1), kl, g.float().contiguous(), dz, *z.shape, temperature,
            logits.softcap or 1.0, logits.scale, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns,
            FORWARD=direction == "forward", CAPPED=logits.softcap is not None,
        )  # fmt: skip
    return dz.to(logits.dtype)


def check(hidden: Tensor, dtype: torch.dtype) -> None:
    """Raises where the kernels cannot run."""
    TritonLogits.check(hidden, dtype)


def _room(z: Tensor, logits: Logits) -> Tensor:
    """Where dz goes: z itself, or a tensor of the products' dtype (not in the interpreter, which cuts fp32 to bf16)."""
    stored = torch.float32 if INTERPRETED else logits.dtype
    return z if stored == z.dtype else torch.empty_like(z, dtype=stored)
