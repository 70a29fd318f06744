"""The KL divergence between what two output heads predict, one a row, without ever holding the logits.

    forward: KL(q || p) = sum_j q_j (log q_j - log p_j),    d KL / d z_j = p_j - q_j
    reverse: KL(p || q) = sum_j p_j (log p_j - log q_j),    d KL / d z_j = p_j (log p_j - log q_j - KL)

with p the student's softmax of z, q the reference's. Companion of `linear_cross_entropy` for terms against a reference
model, with the same three backends. With a frozen head it takes three products of the heads, as kept logits would; the
products are the BLAS library's in every backend, and Triton saves passes over the logits between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.chunked_cross_entropy import (
    Gradients,
    Held,
    Logits,
    Part,
    Tile,
    cast,
    checkpointed,
    even_slices,
    no_autocast,
    once,
    sub,
    wide,
)
from lightning_peft.kernels.linear_cross_entropy import BACKENDS, check_head, logits_of, triton_serves

DIRECTIONS = ("forward", "reverse")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    hidden_ref: Tensor,
    weight_ref: Tensor,
    bias: Tensor | None = None,
    bias_ref: Tensor | None = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> Tensor:
    """KL divergence of each row, [N] in fp32, differentiable in the student's hidden, weight and bias alone.

    Exactly 0, with a gradient of exactly 0, where both sides are the same. Rows that do not count are left out by the
    caller, before the call.

    Args:
        hidden: The student's rows [N, H], floating.
        weight: The student's head [V, H], of the same dtype (under autocast any).
        hidden_ref: The reference's rows [N, H']; width and dtype may be others than the student's.
        weight_ref: The reference's head [V, H'].
        bias: The student's bias [V] or None.
        bias_ref: The reference's bias [V] or None.
        direction: "forward" is KL(reference || student), "reverse" is KL(student || reference).
        temperature: Both sides' logits are divided by it, after the cap. The result is not multiplied by its square.
        softcap: Gemma's cap of the logits, on both sides.
        logit_scale: Factor on the logits, on both sides, before the cap.
        backend: "auto", "triton", "torch" or "reference" (differentiable twice).
        chunk_rows: How many rows' worth of logits are held at once; by default a few tens of megabytes.

    Raises:
        ValueError: Shapes, dtypes or arguments that do not fit; the message says which.
        RuntimeError: On a second derivative through any backend but "reference".
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known: use one of {BACKENDS}.")
    if direction not in DIRECTIONS:
        raise ValueError(
            f"direction={direction!r}: use 'forward' for KL(reference || student) or 'reverse' for the other way round."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    check_head(hidden, weight, bias)
    check_head(hidden_ref, weight_ref, bias_ref, "_ref")
    if len(hidden) != len(hidden_ref) or len(weight) != len(weight_ref):
        raise ValueError(
            f"student and reference must have as many rows and the same vocabulary; got hidden {tuple(hidden.shape)}, "
            f"weight {tuple(weight.shape)}, hidden_ref {tuple(hidden_ref.shape)}, weight_ref {tuple(weight_ref.shape)}."
        )
    logits = logits_of(hidden, weight, softcap, logit_scale, "torch", chunk_rows)
    logits = replace(logits, held=logits.held // 2)  # there are two tiles, the student's and the reference's
    logits_ref = logits_of(hidden_ref, weight_ref, softcap, logit_scale, "torch", chunk_rows)
    bias_ref = None if bias_ref is None else bias_ref.detach()
    reference = Reference(hidden_ref.detach(), weight_ref.detach(), bias_ref, logits_ref)
    if backend == "reference":
        return reference_divergences(hidden, weight, bias, reference, logits, direction, temperature)
    wants_grad, steps = torch.is_grad_enabled(), steps_of(backend, hidden, logits.dtype)
    return RowDivergences.apply(hidden, weight, bias, reference, logits, steps, direction, temperature, wants_grad)


class Reference(NamedTuple):
    """The side that gets no gradient."""

    rows: Tensor
    weight: Tensor
    bias: Part
    logits: Logits

    def into(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        """Its logits of these rows and columns, written into z."""
        dtype = self.logits.dtype
        h, w, b = self.rows[rows].to(dtype), self.weight[columns].to(dtype), cast(sub(self.bias, columns), dtype)
        return self.logits.into(z, h, w, b)


class Steps(NamedTuple):
    """What is done to logits between the products, by one backend."""

    divergences_: Callable[..., Part]
    gradient_: Callable[..., Tensor]


def steps_of(backend: str, hidden: Tensor, dtype: torch.dtype) -> Steps:
    """Those of the backend, which "auto" chooses as `linear_cross_entropy` does."""
    if backend == "triton" or (backend == "auto" and triton_serves(hidden, dtype)):
        try:
            from lightning_peft.kernels import triton_kl
        except ImportError as missing:
            raise ImportError("backend='triton' needs the package triton: install it or use 'torch'.") from missing
        triton_kl.check(hidden, dtype)
        return Steps(triton_kl.divergences_, triton_kl.gradient_)
    return Steps(divergences_, gradient_)


class RowDivergences(torch.autograd.Function):
    """KL of rows for any upstream: a frozen head's gradient in the forward, else from logits made again."""

    @staticmethod
    def forward(ctx, rows, weight, bias, reference, logits, steps, direction, temperature, wants_grad):  # type: ignore[no-untyped-def]
        n, v, dtype = len(rows), len(weight), wide(rows)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        d_rows = torch.empty_like(rows) if wants_grad and ctx.needs_input_grad[0] and not trained else None
        kl = torch.empty(n, dtype=dtype, device=rows.device)
        sides = torch.empty(2, 2, n, 1, dtype=dtype, device=rows.device)  # student and reference; top and log total
        held, held_ref = Held(rows), Held(rows)
        with no_autocast(rows):
            w, b = weight.to(logits.dtype), cast(bias, logits.dtype)
            for part in even_slices(n, logits.held // v):
                h = rows[part].to(logits.dtype)
                z = logits.into(held.view(len(h), v), h, w, b)
                z_ref = reference.into(held_ref.view(len(h), v), part, slice(0, v))
                known = z, z_ref, sides[:, :, part], kl[part]
                dz = steps.divergences_(*known, logits, direction, temperature, d_rows is not None)
                if d_rows is not None:
                    d_rows[part] = dz @ w
        ctx.settings = (reference, logits, steps, direction, temperature)
        if wants_grad:
            ctx.save_for_backward(rows, weight, bias, kl, sides, d_rows)
        return kl

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        rows, weight, bias, kl, sides, d_kl = ctx.saved_tensors
        reference, logits, steps, direction, temperature = ctx.settings
        held_ref = Held(rows)

        def gradient(z: Tensor, tile: Tile) -> Tensor:
            logits.into(z, tile.h, tile.w, tile.b)
            z_ref = reference.into(held_ref.view(*z.shape), tile.rows, tile.columns)
            known = z, z_ref, sides[:, :, tile.rows], kl[tile.rows], g[tile.rows]
            return steps.gradient_(*known, logits, direction, temperature)

        with torch.no_grad(), no_autocast(rows):
            grads: Gradients = (None, None, None)
            if d_kl is not None:
                grads = ((d_kl * g[:, None]).to(rows.dtype), None, None)
            else:
                grads = logits.over_tiles(rows, weight, bias, ctx.needs_input_grad[:3], gradient)
        return (*(once(grad, rows, weight, bias, g) for grad in grads), *[None] * 6)


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
    """Of whole rows' logits [R, V]: their KL into `kl` [R], each side's softmax's parts into `sides` [2, 2, R, 1].

    Returns d KL / d (h W^T), [R, V] in the products' dtype, if `pulled`. Uses up both buffers of logits.
    """
    slope = logits.slope(z) if pulled else None
    log_softmax_(z, temperature, sides[0])
    log_softmax_(z_ref, temperature, sides[1])
    gap = z_ref - z
    torch.sum(gap.mul_(z_ref.exp() if direction == "forward" else -z.exp()), dim=1, out=kl)
    return logits.before_cap(pull_(z, z_ref, kl, direction).div_(temperature), slope) if pulled else None


def gradient_(
    z: Tensor, z_ref: Tensor, sides: Tensor, kl: Tensor, g: Tensor, logits: Logits, direction: str, temperature: float
) -> Tensor:
    """g_i d KL_i / d (h W^T) of a tile of logits [R, C], in the products' dtype. Uses up both buffers."""
    slope = logits.slope(z)
    for x, (top, log_total) in zip((z, z_ref), sides):
        x.div_(temperature).sub_(top).sub_(log_total).clamp_min_(lowest(x))
    return logits.before_cap(pull_(z, z_ref, kl, direction).mul_((g / temperature)[:, None]), slope)


def log_softmax_(z: Tensor, temperature: float, parts: Tensor) -> None:
    """z [R, V] becomes log softmax(z / temperature), z / temperature - top - log total; `parts` [2, R, 1] gets those.

    Taken off one by one, as their sum would be rounded at the logits' size, and a p near 1 with it.
    """
    top, log_total = parts
    torch.amax(z.div_(temperature), dim=1, keepdim=True, out=top)
    torch.log(z.sub_(top).exp().sum(dim=1, keepdim=True), out=log_total)
    z.sub_(log_total).clamp_min_(lowest(z))


def lowest(log_p: Tensor) -> float:
    """What stands for log 0 where the vocabulary is masked (a bias of -inf): the gap of two -inf would be nan."""
    return torch.finfo(log_p.dtype).min / 4


def pull_(log_p: Tensor, log_q: Tensor, kl: Tensor, direction: str) -> Tensor:
    """d KL / d (z / temperature), [R, C]; uses up both arguments."""
    if direction == "forward":
        return log_p.exp_().sub_(log_q.exp_())
    gap = torch.sub(log_p, log_q, out=log_q).sub_(kl[:, None])
    return log_p.exp_().mul_(gap)


def reference_divergences(
    rows: Tensor, weight: Tensor, bias: Part, reference: Reference, logits: Logits, direction: str, temperature: float
) -> Tensor:
    """The same by plain differentiable torch, chunk by chunk under checkpointing."""
    weight, bias = weight.to(wide(rows)), cast(bias, wide(rows))  # so that the chunks' gradients are added up in fp32

    def chunk(part: slice) -> Tensor:
        with no_autocast(rows):
            log_p = (logits.of(rows[part], weight, bias) / temperature).log_softmax(dim=1)
            z_ref = reference.logits.of(reference.rows[part], reference.weight, reference.bias)
            log_q = (z_ref / temperature).log_softmax(dim=1)
        log_p, log_q = log_p.clamp_min(lowest(log_p)), log_q.clamp_min(lowest(log_q))
        if direction == "forward":
            return (log_q.exp() * (log_q - log_p)).sum(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)

    chunks = even_slices(len(rows), logits.held // len(weight))
    return torch.cat([checkpointed(chunk, part) for part in chunks] or [chunk(slice(0))])
