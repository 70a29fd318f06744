"""The KL divergence between what two output heads predict, one a row, without ever holding the logits.

    forward: KL(q || p) = sum_j q_j (log q_j - log p_j),    d KL / d z_j = p_j - q_j
    reverse: KL(p || q) = sum_j p_j (log p_j - log q_j),    d KL / d z_j = p_j (log p_j - log q_j - KL)

with p the student's softmax of z, q the reference's. Companion of `linear_cross_entropy` for terms against a reference
model. Plain torch on every device, CUDA too: with a frozen head it takes three products of the heads, as kept logits
would, and a kernel of its own could save no more than passes over memory.
"""

from __future__ import annotations

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
from lightning_peft.kernels.linear_cross_entropy import check_head, logits_of

BACKENDS = ("auto", "torch", "reference")
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
        backend: "auto" and "torch" are the same; "reference" is differentiable twice.
        chunk_rows: How many rows' worth of logits are held at once; by default a few tens of megabytes.

    Raises:
        ValueError: Shapes, dtypes or arguments that do not fit; the message says which.
        RuntimeError: On a second derivative through any backend but "reference".
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: linear_kl has {BACKENDS}; 'torch' runs on every device.")
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
    wants_grad = torch.is_grad_enabled()
    return RowDivergences.apply(hidden, weight, bias, reference, logits, direction, temperature, wants_grad)


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


class RowDivergences(torch.autograd.Function):
    """KL of rows for any upstream: a frozen head's gradient in the forward, else from logits made again."""

    @staticmethod
    def forward(ctx, rows, weight, bias, reference, logits, direction, temperature, wants_grad):  # type: ignore[no-untyped-def]
        n, v, dtype = len(rows), len(weight), wide(rows)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        d_rows = torch.empty_like(rows) if wants_grad and ctx.needs_input_grad[0] and not trained else None
        kl = torch.empty(n, dtype=dtype, device=rows.device)
        parts, parts_ref = torch.empty(2, 2, n, 1, dtype=dtype, device=rows.device)  # each side's top and log total
        held, held_ref = Held(rows), Held(rows)
        with no_autocast(rows):
            w, b = weight.to(logits.dtype), cast(bias, logits.dtype)
            for part in even_slices(n, logits.held // v):
                h = rows[part].to(logits.dtype)
                z = logits.into(held.view(len(h), v), h, w, b)
                slope = None if d_rows is None else logits.slope(z)
                z_ref = reference.into(held_ref.view(len(h), v), part, slice(0, v))
                log_softmax_(z, temperature, parts[:, part])
                log_softmax_(z_ref, temperature, parts_ref[:, part])
                gap = z_ref - z
                kl[part] = gap.mul_(z_ref.exp() if direction == "forward" else -z.exp()).sum(dim=1)
                if d_rows is not None:
                    dz = pull_(z, z_ref, kl[part], direction).div_(temperature)
                    d_rows[part] = logits.before_cap(dz, slope) @ w
        ctx.settings = (reference, logits, direction, temperature)
        if wants_grad:
            ctx.save_for_backward(rows, weight, bias, kl, parts, parts_ref, d_rows)
        return kl

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        rows, weight, bias, kl, parts, parts_ref, d_kl = ctx.saved_tensors
        reference, logits, direction, temperature = ctx.settings
        held_ref = Held(rows)

        def gradient(z: Tensor, tile: Tile) -> Tensor:
            logits.into(z, tile.h, tile.w, tile.b)
            slope = logits.slope(z)
            z_ref = reference.into(held_ref.view(*z.shape), tile.rows, tile.columns)
            for side, known in ((z, parts), (z_ref, parts_ref)):
                top, log_total = known[:, tile.rows]
                side.div_(temperature).sub_(top).sub_(log_total)
            dz = pull_(z, z_ref, kl[tile.rows], direction).mul_((g[tile.rows] / temperature)[:, None])
            return logits.before_cap(dz, slope)

        with torch.no_grad(), no_autocast(rows):
            grads: Gradients = (None, None, None)
            if d_kl is not None:
                grads = ((d_kl * g[:, None]).to(rows.dtype), None, None)
            else:
                grads = logits.over_tiles(rows, weight, bias, ctx.needs_input_grad[:3], gradient)
        return (*(once(grad, rows, weight, bias, g) for grad in grads), None, None, None, None, None)


def log_softmax_(z: Tensor, temperature: float, parts: Tensor) -> None:
    """z [R, V] becomes log softmax(z / temperature), z / temperature - top - log total; `parts` [2, R, 1] gets those.

    Taken off one by one, as their sum would be rounded at the logits' size, and a p near 1 with it.
    """
    top, log_total = parts
    torch.amax(z.div_(temperature), dim=1, keepdim=True, out=top)
    torch.log(z.sub_(top).exp().sum(dim=1, keepdim=True), out=log_total)
    z.sub_(log_total)


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
        if direction == "forward":
            return (log_q.exp() * (log_q - log_p)).sum(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)

    chunks = even_slices(len(rows), logits.held // len(weight))
    return torch.cat([checkpointed(chunk, part) for part in chunks] or [chunk(slice(0))])
