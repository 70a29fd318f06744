"""The Triton path of `linear_cross_entropy`: two kernels, one for the statistics and one for the logits' gradient.

`_statistics_kernel` multiplies a block of rows with the vocabulary, tile by tile, and keeps an online logsumexp in
registers, so the forward holds [N] numbers and no logits (Wijmans et al., arXiv 2411.09009, algorithm 2).
`_gradient_kernel` makes a tile of dz = d loss / d logits, from the product made again or from logits kept by the first
kernel, in one pass in the dtype of the products. What follows, dH = dz W and dW = dz^T H, are plain matrix products of
full size: those are the BLAS library's, which beats a hand-written loop, needs no atomics and adds in a fixed order.

A frozen head and a rule's weights keep one chunk of logits [R, V] in the forward, so that each is made once: two and
three products of the head. With a trainable head and any upstream it is four.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft.kernels.chunked_cross_entropy import (
    Held,
    Logits,
    Part,
    Statistics,
    Tile,
    Upstream,
    both,
    cast,
    even_slices,
    joined,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; not -inf: -inf - -inf is nan


@triton.jit
def _logits(
    h, w, b, row, column, n, v, width, h_stride, w_stride, scale, softcap,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_ROWS, BLOCK_COLUMNS] in fp32 from `row` and `column` on; the operands' dtype is that of h."""
    # A head may have more than 2^31 elements; 64-bit numbers are kept to scalars, or they would fill the registers.
    h += row.to(tl.int64) * h_stride
    w += column.to(tl.int64) * w_stride
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        k = start + tl.arange(0, BLOCK_WIDTH)
        inside = k < width
        left = tl.load(h + i[:, None] * h_stride + k[None, :], mask=(row + i < n)[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            w + j[None, :] * w_stride + k[:, None], mask=(column + j < v)[None, :] & inside[:, None], other=0.0
        )
        right = right.to(left.dtype)
        if WIDEN:  # Triton's interpreter multiplies the bit patterns of bf16
            left, right = left.to(tl.float32), right.to(tl.float32)
        z = tl.dot(left, right, z, input_precision=PRECISION)
    if BIASED:
        z += tl.load(b + column + j, mask=column + j < v, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if CAPPED:
        # tanh x = 1 - 2 / (exp 2x + 1): exact at both ends, where exp is 0 or inf
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))
    return z


@triton.jit
def _statistics_kernel(
    h, w, b, y, tops, totals, spreads, label_zs, kept, n, v, width, h_stride, w_stride, scale, softcap, tiles,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ENTROPY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One block of rows over `tiles` tiles of the vocabulary: its maximum and, relative to it, the sums over e^z."""
    row, split = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    rows = row + i
    label = tl.load(y + rows, mask=rows < n, other=-1)
    top = tl.full([BLOCK_ROWS], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    spread = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    label_z = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        column = tile * BLOCK_COLUMNS
        columns = column + j
        z = _logits(
            h, w, b, row, column, n, v, width, h_stride, w_stride, scale, softcap,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, BIASED, CAPPED, PRECISION, WIDEN,
        )  # fmt: skip
        if KEEP:
            inside = (rows < n)[:, None] & (columns < v)[None, :]
            tl.store(kept + row.to(tl.int64) * v + column + (i[:, None] * v + j[None, :]), z, mask=inside)
        z = tl.where((columns < v)[None, :], z, float("-inf"))
        label_z += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), axis=1)
        highest = tl.maximum(top, tl.max(z, axis=1))
        decay = tl.exp(top - highest)
        shifted = z - highest[:, None]
        e = tl.exp(shifted)
        if ENTROPY:
            moved = decay * (spread + (top - highest) * total)
            spread = moved + tl.sum(tl.where(e > 0, e * shifted, 0.0), axis=1)
        total = decay * total + tl.sum(e, axis=1)
        top = highest
    at = split * n + rows
    tl.store(tops + at, top, mask=rows < n)
    tl.store(totals + at, total, mask=rows < n)
    tl.store(label_zs + at, label_z, mask=rows < n)
    if ENTROPY:
        tl.store(spreads + at, spread, mask=rows < n)


@triton.jit
def _gradient_kernel(
    h, w, b, kept, y, top, total, entropy, share, g, g_entropy, dz,
    n, v, width, first, h_stride, w_stride, scale, softcap,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    KEPT: tl.constexpr, LABELLED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """dz = share p - g 1[j = y] - g_entropy p (log p + H), times cap's slope and scale; column 0 is number `first`."""
    row, column = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    rows, columns = row + i, column + j
    corner, at = row.to(tl.int64) * v + column, i[:, None] * v + j[None, :]
    inside = (rows < n)[:, None] & (columns < v)[None, :]
    if KEPT:
        z = tl.load(kept + corner + at, mask=inside, other=0.0)
    else:
        z = _logits(
            h, w, b, row, column, n, v, width, h_stride, w_stride, scale, softcap,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, BIASED, CAPPED, PRECISION, WIDEN,
        )  # fmt: skip
    shifted = z - tl.load(top + rows, mask=rows < n, other=0.0)[:, None]
    sums = tl.load(total + rows, mask=rows < n, other=1.0)
    p = tl.exp(shifted) / sums[:, None]
    d = p * tl.load(share + rows, mask=rows < n, other=0.0)[:, None]
    if LABELLED:
        label = tl.load(y + rows, mask=rows < n, other=-1) - first
        here = columns[None, :] == label[:, None]
        d -= tl.where(here, tl.load(g + rows, mask=rows < n, other=0.0)[:, None], 0.0)
    if ENTROPY:
        bent = shifted + (tl.load(entropy + rows, mask=rows < n, other=0.0) - tl.log(sums))[:, None]
        d -= tl.where(p > 0, p * bent, 0.0) * tl.load(g_entropy + rows, mask=rows < n, other=0.0)[:, None]
    if CAPPED:
        d *= 1 - (z / softcap) * (z / softcap)
    tl.store(dz + corner + at, (d * scale).to(dz.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_statistics_kernel, triton.runtime.JITFunction)


class TritonLogits(Logits):
    """The same quantities as `Logits`, made by the kernels above."""

    @staticmethod
    def check(hidden: Tensor, dtype: torch.dtype) -> None:
        """Raises where the kernels cannot run."""
        if not (hidden.is_cuda or INTERPRETED):
            raise ValueError(
                f"backend='triton' needs CUDA tensors, and hidden is on {hidden.device}: use backend='torch' (or, to "
                "debug the kernels, set TRITON_INTERPRET=1 before their first use)."
            )
        if dtype == torch.float64:
            raise ValueError("backend='triton' computes in fp32, bf16 or fp16, not in float64: use backend='torch'.")

    def statistics(
        self, rows: Tensor, weight: Tensor, bias: Part, labels: Tensor, with_entropy: bool, d_rows: Part = None
    ) -> Statistics:
        h = rows.to(self.dtype)
        if d_rows is None:
            return self._statistics(h, weight, bias, labels, with_entropy, None)
        w, held, found = weight.to(self.dtype), Held(rows), []
        for part in even_slices(len(h), self.held_rows):
            z = held.view(part.stop - part.start, len(w))
            made, gradient = self.row_gradient(z, h[part], w, bias, labels[part], with_entropy)
            d_rows[part] = gradient(torch.ones_like(made.nll)) @ w
            found.append(made)
        return joined(found, rows, with_entropy)

    def row_gradient(
        self, z: Tensor, h: Tensor, w: Tensor, b: Part, labels: Tensor, with_entropy: bool
    ) -> tuple[Statistics, Callable[[Tensor], Tensor]]:
        found = self._statistics(h, w, b, labels, with_entropy, z)

        def gradient(g: Tensor) -> Tensor:
            dz = z if self.stored == z.dtype else torch.empty_like(z, dtype=self.stored)
            return self._gradient(dz, h, w, b, labels, 0, found, Upstream(g, None, None), z)

        return found, gradient

    def tile_gradient(self, z: Tensor, tile: Tile, labels: Tensor, found: Statistics, g: Upstream) -> Tensor:
        dz = z.view(-1).view(self.stored)[: z.numel()].view(z.shape)  # no logits are kept: the buffer is dz's alone
        return self._gradient(dz, tile.h, tile.w, tile.b, labels, tile.columns.start, found, g, None)

    @property
    def stored(self) -> torch.dtype:
        """What dz is written in: the products' dtype, but for the interpreter, which cuts fp32 to bf16 unrounded."""
        return torch.float32 if INTERPRETED else self.dtype

    def _statistics(self, h: Tensor, w: Tensor, b: Part, labels: Tensor, with_entropy: bool, kept: Part) -> Statistics:
        """Every row's statistics; into `kept` [N, V], if given, also the logits."""
        h, w, b = straight(h), straight(w), cast(b, self.dtype)
        if INTERPRETED:
            w = w.to(self.dtype)  # on a GPU the kernel rounds, and no second copy of the head is made
        n, v = len(h), len(w)
        if n == 0:
            return joined([], h, with_entropy)
        settings = self._settings(b)
        blocks, all_tiles = triton.cdiv(n, settings["BLOCK_ROWS"]), triton.cdiv(v, settings["BLOCK_COLUMNS"])
        # Few rows do not fill a GPU: the vocabulary is split among programs, and the parts are put together below.
        processors = torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 1
        tiles = triton.cdiv(all_tiles, min(all_tiles, triton.cdiv(4 * processors, blocks)))
        splits = triton.cdiv(all_tiles, tiles)
        tops, totals, spreads, label_zs = torch.empty(4, splits, n, dtype=torch.float32, device=h.device)
        with on_device(h):
            _statistics_kernel[(blocks, splits)](
                h, w, h if b is None else b, labels, tops, totals, spreads, label_zs, h if kept is None else kept,
                n, v, h.shape[1], h.stride(0), w.stride(0), self.scale, self.softcap or 1.0, tiles,
                ENTROPY=with_entropy, KEEP=kept is not None, **settings,
            )  # fmt: skip
        top, label_z = tops.amax(dim=0), label_zs.sum(dim=0)
        fall = tops - top
        decay = fall.exp()
        total = (decay * totals).sum(dim=0)
        log_total = total.log()
        entropy = log_total - (decay * (spreads + fall * totals)).sum(dim=0) / total if with_entropy else None
        return Statistics(log_total - (label_z - top), top, total, entropy, label_z == top)

    def _gradient(
        self,
        dz: Tensor,
        h: Tensor,
        w: Tensor,
        b: Part,
        labels: Tensor,
        first: int,
        found: Statistics,
        g: Upstream,
        kept: Part,
    ) -> Tensor:
        """dz [R, C], from `kept` logits or from logits made again."""
        share = both(g.nll, g.lse)
        share = torch.zeros_like(found.top) if share is None else share.float().contiguous()
        h, w = straight(h), straight(w)
        settings = self._settings(b)
        if kept is not None:  # no product: small blocks, for the bandwidth
            settings |= {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256, "num_warps": 4}
        grid = (triton.cdiv(len(h), settings["BLOCK_ROWS"]), triton.cdiv(len(w), settings["BLOCK_COLUMNS"]))
        with on_device(h):
            _gradient_kernel[grid](
                h, w, h if b is None else b, h if kept is None else kept, labels, found.top, found.total,
                share if found.entropy is None else found.entropy, share,
                share if g.nll is None else g.nll.float().contiguous(),
                share if g.entropy is None else g.entropy.float().contiguous(), dz,
                len(h), len(w), h.shape[1], first, h.stride(0), w.stride(0), self.scale, self.softcap or 1.0,
                KEPT=kept is not None, LABELLED=g.nll is not None, ENTROPY=g.entropy is not None, **settings,
            )  # fmt: skip
        return dz.to(self.dtype)

    def _settings(self, bias: Part) -> dict[str, Any]:
        """Blocks that leave no register spilled and 48 to 64 kB of shared memory used, on sm_80 to sm_100 (ptxas)."""
        full = self.dtype == torch.float32
        return {
            "BLOCK_ROWS": 64 if full else 128,
            "BLOCK_COLUMNS": 64 if full else 128,
            "BLOCK_WIDTH": 32,
            "BIASED": bias is not None,
            "CAPPED": self.softcap is not None,
            # fp32 products are as exact here as torch's own are set to be.
            "PRECISION": "tf32" if full and torch.get_float32_matmul_precision() != "highest" else "ieee",
            "WIDEN": INTERPRETED,
            "num_warps": 4 if full else 8,
            "num_stages": 3,
        }


def straight(x: Tensor) -> Tensor:
    """With neighbours in a row next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
