"""The torch paths of `linear_cross_entropy`: chunks of rows, gradients by hand, and one that differentiates twice.

Shapes: rows of a chunk C, width H, vocabulary V; h [C, H], W [V, H], z and p [C, V] in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Part = Tensor | None


class Logits(NamedTuple):
    """How logits are made: z = softcap * tanh(scale * (h W^T + b) / softcap), products in `dtype`, the rest in fp32."""

    softcap: float | None
    scale: float
    dtype: torch.dtype
    chunk_rows: int

    def of(self, rows: Tensor, weight: Tensor, bias: Part) -> Tensor:
        """z [C, V] in fp32 (float64 stays); a buffer of its own that may be written to."""
        raw = F.linear(rows, weight, bias)
        z = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
        if self.scale != 1.0:
            z = z * self.scale if z.requires_grad else z.mul_(self.scale)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z

    def chain(self, dz: Tensor, z: Part) -> Tensor:
        """The gradient before scale and cap, from dz after them; in place. d cap/dx = 1 - (z / softcap)^2."""
        if self.softcap is not None:
            assert z is not None
            dz.mul_(1 - (z / self.softcap).square_())
        return dz.mul_(self.scale) if self.scale != 1.0 else dz

    def chunks(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, n))


class Chunk(NamedTuple):
    """A chunk's statistics [C] and, in the buffer that held z, `share * total` [C, V] with `share` its softmax."""

    nll: Tensor
    lse: Tensor
    entropy: Part
    is_argmax: Tensor
    exps: Tensor  # exp(z - top): not yet divided by its sum, to save a pass over [C, V]
    total: Tensor
    z: Part  # kept only where the cap's derivative wants it


def softmax_chunk(z: Tensor, labels: Tensor, with_entropy: bool, keep_z: bool, lse: Part = None) -> Chunk:
    """Turns z into exp(z - top) in place, with what is needed of z read first; a known `lse` saves two passes."""
    top = z.amax(dim=1) if lse is None else lse
    label_z = z.gather(1, labels[:, None]).squeeze(1)
    kept = z.clone() if keep_z else None
    exps = z.sub_(top[:, None]).exp_()
    total = exps.sum(dim=1) if lse is None else torch.ones_like(lse)
    log_total = total.log()
    lse = top + log_total
    # -sum_j p_j log p_j with p = e / S is log S + sum_j entr(e_j) / S
    entropy = log_total + torch.special.entr(exps).sum(dim=1) / total if with_entropy else None
    return Chunk(lse - label_z, lse, entropy, label_z == top, exps, total, kept)


def logit_gradient(chunk: Chunk, labels: Tensor, g: Part, g_lse: Part = None, g_entropy: Part = None) -> Tensor:
    """dz_ij = g_i (p_ij - 1[j = y_i]) + g_lse_i p_ij - g_entropy_i p_ij (log p_ij + H_i), in `chunk.exps`."""
    exps, extra = chunk.exps, None
    if g_entropy is not None:
        assert chunk.entropy is not None
        offset = (chunk.entropy - chunk.total.log())[:, None]  # log p + H = log e - log S + H
        extra = exps.clamp_min(torch.finfo(exps.dtype).tiny).log_().add_(offset)
        extra = extra.mul_(exps).mul_((-g_entropy / chunk.total)[:, None])
    both = g if g_lse is None else (g_lse if g is None else g + g_lse)
    dz = exps.zero_() if both is None else exps.mul_((both / chunk.total)[:, None])
    if g is not None:
        dz.scatter_add_(1, labels[:, None], -g[:, None].to(dz.dtype))
    return dz if extra is None else dz.add_(extra)


def _columns(n: int, like: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    columns = {name: torch.empty(n, dtype=dtype, device=like.device) for name in ("nll", "lse", "entropy")}
    columns["is_argmax"] = torch.empty(n, dtype=torch.bool, device=like.device)
    return {name: column for name, column in columns.items() if name in names}


def _autocast_off(rows: Tensor) -> Any:
    return torch.autocast(rows.device.type, enabled=False)


class OnlyOnce(torch.autograd.Function):
    """Passes a gradient on and raises if it is differentiated again, whichever way the graph runs."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Part) -> Tensor:  # the further inputs tie it to what it depends on
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "this path of linear_cross_entropy can be differentiated once: for a second derivative (meta-learning) "
            "call it with backend='reference'."
        )


def _once(grad: Part, *inputs: Part) -> Part:
    return OnlyOnce.apply(grad, *inputs) if grad is not None and torch.is_grad_enabled() else grad


def _outputs(columns: dict[str, Tensor], ctx: Any) -> tuple[Part, ...]:
    if "is_argmax" in columns:
        ctx.mark_non_differentiable(columns["is_argmax"])
    return tuple(columns.get(name) for name in ("nll", "lse", "entropy", "is_argmax"))


def _backward_through_logits(
    saved: tuple[Tensor, ...], logits: Logits, needs: tuple[bool, bool, bool], gs: tuple[Part, Part, Part]
) -> tuple[Part, Part, Part]:
    """Gradients of hidden, weight and bias with the logits made again, chunk by chunk."""
    rows, weight, bias, labels, lse = saved
    w, b = weight.to(logits.dtype), None if bias is None else bias.to(logits.dtype)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    d_rows = torch.empty_like(rows) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
    for part in logits.chunks(len(rows)):
        h = rows[part].to(logits.dtype)
        known = None if lse is None else lse[part]
        chunk = softmax_chunk(logits.of(h, w, b), labels[part], gs[2] is not None, logits.softcap is not None, known)
        g, g_lse, g_entropy = (None if x is None else x[part] for x in gs)
        dz = logits.chain(logit_gradient(chunk, labels[part], g, g_lse, g_entropy), chunk.z)
        add_products(dz, h, w, d_rows, d_weight, d_bias, part)
    return d_rows, _cast(d_weight, weight), _cast(d_bias, bias)


def add_products(dz: Tensor, h: Tensor, w: Tensor, d_rows: Part, d_weight: Part, d_bias: Part, part: slice) -> None:
    """dH = dz W, dW += dz^T H, db += sum dz, for one chunk."""
    narrow = dz.to(w.dtype)
    if d_rows is not None:
        if d_rows.dtype == w.dtype:
            torch.mm(narrow, w, out=d_rows[part])
        else:
            d_rows[part] = narrow @ w
    if d_weight is not None:
        if d_weight.dtype == w.dtype:
            d_weight.addmm_(narrow.t(), h)
        else:
            d_weight += narrow.t() @ h
    if d_bias is not None:
        d_bias += dz.sum(dim=0)


def _cast(grad: Part, like: Part) -> Part:
    return None if grad is None or like is None else grad.to(like.dtype)


class FrozenHead(torch.autograd.Function):
    """nll (and statistics) for a head that does not train: d nll_i / d h_i is made in the forward, kept as [N, H]."""

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, logits, asked, wants_grad):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        columns = _columns(len(rows), rows, asked | {"nll"})
        d_rows = torch.empty_like(rows) if wants_grad and ctx.needs_input_grad[0] else None
        with _autocast_off(rows):
            w, b = weight.to(logits.dtype), None if bias is None else bias.to(logits.dtype)
            for part in logits.chunks(len(rows)):
                y, h = labels[part], rows[part].to(logits.dtype)
                keep_z = d_rows is not None and logits.softcap is not None
                chunk = softmax_chunk(logits.of(h, w, b), y, "entropy" in asked, keep_z)
                for name, column in columns.items():
                    column[part] = getattr(chunk, name)
                if d_rows is not None:
                    dz = logit_gradient(chunk, y, torch.ones_like(chunk.nll))  # p - onehot
                    add_products(logits.chain(dz, chunk.z), h, w, d_rows, None, None, part)
        if d_rows is not None:
            ctx.save_for_backward(d_rows, rows, weight, bias, labels)
            ctx.logits = logits
        return _outputs(columns, ctx)

    @staticmethod
    def backward(ctx, g, g_lse, g_entropy, _):  # type: ignore[no-untyped-def]
        d_nll, rows, weight, bias, labels = ctx.saved_tensors
        with torch.no_grad():
            grad = None if g is None else (d_nll * g[:, None].to(d_nll.dtype))
            if g_lse is not None or g_entropy is not None:
                saved: tuple[Any, ...] = (rows, weight, bias, labels, None)
                with _autocast_off(rows):
                    more = _backward_through_logits(saved, ctx.logits, (True, False, False), (None, g_lse, g_entropy))
                grad = more[0] if grad is None else grad + more[0]
        return _once(grad, rows, g, g_lse, g_entropy), None, None, None, None, None, None


class TrainableHead(torch.autograd.Function):
    """nll (and statistics) for a head that trains, for any upstream: the backward makes the logits again."""

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, logits, asked, wants_grad):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        columns = _columns(len(rows), rows, asked | {"nll", "lse"})
        with _autocast_off(rows):
            w, b = weight.to(logits.dtype), None if bias is None else bias.to(logits.dtype)
            for part in logits.chunks(len(rows)):
                z = logits.of(rows[part].to(logits.dtype), w, b)
                chunk = softmax_chunk(z, labels[part], "entropy" in asked, False)
                for name, column in columns.items():
                    column[part] = getattr(chunk, name)
        ctx.save_for_backward(rows, weight, bias, labels, columns["lse"])
        ctx.logits = logits
        return _outputs(columns, ctx)

    @staticmethod
    def backward(ctx, g, g_lse, g_entropy, _):  # type: ignore[no-untyped-def]
        rows, weight, bias, *_ = ctx.saved_tensors
        with torch.no_grad(), _autocast_off(rows):
            needs = ctx.needs_input_grad[:3]
            grads = _backward_through_logits(ctx.saved_tensors, ctx.logits, needs, (g, g_lse, g_entropy))
        inputs = (rows, weight, bias, g, g_lse, g_entropy)
        return (*(_once(grad, *inputs) for grad in grads), None, None, None, None)


class WeightedRows(torch.autograd.Function):
    """sum_i s_i w_i nll_i with w a rule: every gradient in the forward, scaled by the upstream in the backward."""

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, factors, logits, asked, weigh, wants_grad):  # type: ignore[no-untyped-def]
        names = asked | {"nll"}
        columns = _columns(len(rows), rows, names)
        weights = torch.empty_like(columns["nll"])
        needs = [wants_grad and need for need in ctx.needs_input_grad[:3]]
        wide = weights.dtype
        d_rows = torch.empty_like(rows) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
        with torch.no_grad(), _autocast_off(rows):
            w, b = weight.to(logits.dtype), None if bias is None else bias.to(logits.dtype)
            for part in logits.chunks(len(rows)):
                y, h = labels[part], rows[part].to(logits.dtype)
                keep_z = any(needs) and logits.softcap is not None
                chunk = softmax_chunk(logits.of(h, w, b), y, "entropy" in asked, keep_z)
                for name, column in columns.items():
                    column[part] = getattr(chunk, name)
                weights[part] = weigh(chunk.nll, chunk.entropy, chunk.is_argmax, part.start)
                if any(needs):
                    g = weights[part] if factors is None else weights[part] * factors[part]
                    dz = logits.chain(logit_gradient(chunk, y, g), chunk.z)
                    add_products(dz, h, w, d_rows, d_weight, d_bias, part)
        summed = weights * columns["nll"]
        loss = (summed if factors is None else summed * factors).sum()
        ctx.save_for_backward(d_rows, _cast(d_weight, weight), _cast(d_bias, bias), rows, weight)
        outputs = (columns["nll"], columns.get("entropy"), columns.get("is_argmax"), weights)
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        return (loss, *outputs)

    @staticmethod
    def backward(ctx, g, *_):  # type: ignore[no-untyped-def]
        *grads, rows, weight = ctx.saved_tensors
        with torch.no_grad():
            scaled = [None if grad is None else grad * g.to(grad.dtype) for grad in grads]
        return (*(_once(grad, rows, weight, g) for grad in scaled), None, None, None, None, None, None)


def reference_statistics(
    rows: Tensor, weight: Tensor, bias: Part, labels: Tensor, logits: Logits, asked: frozenset[str]
) -> tuple[Part, ...]:
    """nll, lse, entropy, is_argmax by plain differentiable torch, chunk by chunk under checkpointing."""

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with _autocast_off(h):
            b = None if bias is None else bias.to(logits.dtype)
            z = logits.of(h.to(logits.dtype), weight.to(logits.dtype), b)
            log_p = z.log_softmax(dim=1)
            nll = -log_p.gather(1, y[:, None]).squeeze(1)
            return nll, z.logsumexp(dim=1), -(log_p.exp() * log_p).sum(dim=1), z.argmax(dim=1) == y

    # Checkpointing keeps memory at a chunk but knows nothing of forward-mode differentiation.
    forward_mode = torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack()
    run: Callable[..., Any] = chunk
    if torch.is_grad_enabled() and not forward_mode:

        def run(h: Tensor, y: Tensor) -> Any:
            return checkpoint(chunk, h, y, use_reentrant=False)

    parts = [run(rows[part], labels[part]) for part in logits.chunks(len(rows))] or [run(rows, labels)]
    columns = dict(zip(("nll", "lse", "entropy", "is_argmax"), (torch.cat(column) for column in zip(*parts))))
    return tuple(columns[name] if name == "nll" or name in asked else None for name in columns)
