"""The torch paths of `linear_cross_entropy`: tiles of logits, gradients by hand, and one that differentiates twice.

Shapes: rows h [N, H], weight W [V, H], labels y [N]; a tile of logits z is [R, C], R rows by C columns of the
vocabulary, in fp32. Statistics, and a frozen head's gradient with them, go over the tiles once with a running maximum,
as flash attention goes over its keys. The backward knows each row's logsumexp, so there a tile stands alone and the
head's gradient is written once. Only a rule's weights, to be known before the head's gradient, need whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Part = Tensor | None
Gradients = tuple[Part, Part, Part]
Needs = tuple[bool, bool, bool]

ROW_BLOCK = 2048  # rows of a tile: products run full from some hundred on, and the columns still number thousands


class Statistics(NamedTuple):
    """Per row: nll, the softmax's parts, the entropy if asked for, and whether the label is the argmax.

    p_ij = exp(z_ij - top_i) / total_i, with top_i a row's largest logit. Their one logarithm, the logsumexp, would be
    rounded at the logits' size, and 1 - p of a nearly certain token be lost.
    """

    nll: Tensor
    top: Tensor
    total: Tensor
    entropy: Part
    is_argmax: Tensor

    @property
    def lse(self) -> Tensor:
        return self.top + self.total.log()

    def of(self, rows: slice) -> Statistics:
        return Statistics(*(sub(x, rows) for x in self))  # type: ignore[arg-type]


class Upstream(NamedTuple):
    """The gradients per row of nll, lse and entropy; None is zero."""

    nll: Part
    lse: Part
    entropy: Part

    def of(self, rows: slice) -> Upstream:
        return Upstream(*(sub(g, rows) for g in self))


class Tile(NamedTuple):
    """Where a tile stands, with its rows [R, H], weight [C, H] and bias [C] in the dtype of the products."""

    rows: slice
    columns: slice
    h: Tensor
    w: Tensor
    b: Part


@dataclass(frozen=True)
class Logits:
    """How logits are made, z = softcap * tanh(scale * (h W^T + b) / softcap), and what is made of them in plain torch.

    Args:
        softcap: The cap, or None.
        scale: Factor before the cap.
        dtype: What the products are computed in; everything else is fp32 (float64 stays).
        held: Logits held at once, as tiles.
        held_rows: Rows of logits held at once, where whole rows are needed.
    """

    softcap: float | None
    scale: float
    dtype: torch.dtype
    held: int
    held_rows: int

    def of(self, rows: Tensor, weight: Tensor, bias: Part) -> Tensor:
        """z [R, C], differentiable."""
        z = F.linear(rows.to(self.dtype), weight.to(self.dtype), cast(bias, self.dtype))
        z = z.to(wide(z)) * self.scale if self.scale != 1.0 else z.to(wide(z))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def into(self, z: Tensor, h: Tensor, w: Tensor, b: Part) -> Tensor:
        """The same written into z, for operands in `dtype`; not differentiable."""
        if z.dtype != self.dtype:
            z.copy_(F.linear(h, w, b))
        elif b is None:
            torch.mm(h, w.t(), out=z)
        else:
            torch.addmm(b, h, w.t(), out=z)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z: Tensor) -> Part:
        """d cap / dx = 1 - (z / softcap)^2; None without a cap."""
        return None if self.softcap is None else (z / self.softcap).square_().neg_().add_(1)

    def before_cap(self, dz: Tensor, slope: Part) -> Tensor:
        """The gradient before scale and cap, in `dtype`; uses up dz."""
        if slope is not None:
            dz.mul_(slope)
        return (dz.mul_(self.scale) if self.scale != 1.0 else dz).to(self.dtype)

    def column_tiles(self, rows: int, vocabulary: int) -> Iterator[slice]:
        return even_slices(vocabulary, self.held // max(1, min(rows, ROW_BLOCK)))

    def statistics(
        self, rows: Tensor, weight: Tensor, bias: Part, labels: Tensor, with_entropy: bool, d_rows: Part = None
    ) -> Statistics:
        """Every row's statistics in one pass over the vocabulary; into `d_rows` [N, H], if given, d nll_i / d h_i."""
        blocks = [
            self._statistics_of_block(rows[part], weight, bias, labels[part], with_entropy, sub(d_rows, part))
            for part in even_slices(len(rows), ROW_BLOCK)
        ]
        return joined(blocks, rows, with_entropy)

    def _statistics_of_block(
        self, rows: Tensor, weight: Tensor, bias: Part, labels: Tensor, with_entropy: bool, d_rows: Part
    ) -> Statistics:
        # With m_i the largest logit so far and e_ij = exp(z_ij - m_i), three sums over all j but the label are carried
        # along, multiplied by exp(m_i - m_i') when the maximum moves: e_ij; e_ij (z_ij - m_i); e_ij W_j. The label
        # joins them at the end: for a token that is nearly certain 1 - p_y is what counts and must not drown in p_y.
        h, y, lowest = rows.to(self.dtype), labels[:, None], torch.finfo(wide(rows)).min
        # The lowest number, not -inf: in a tile that is -inf throughout (a masked vocabulary) -inf - -inf would be nan.
        top = torch.full((len(rows), 1), lowest, dtype=wide(rows), device=rows.device)
        others, spread, label_z = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        pulled = None if d_rows is None else torch.zeros_like(d_rows, dtype=top.dtype)
        held = Held(rows)
        for columns in self.column_tiles(len(rows), len(weight)):
            w, b = weight[columns].to(self.dtype), cast(sub(bias, columns), self.dtype)
            z = self.into(held.view(len(h), len(w)), h, w, b)
            slope = None if pulled is None else self.slope(z)
            highest = torch.maximum(top, z.amax(dim=1, keepdim=True))
            here, at = find_label(y, columns)
            found = z.gather(1, at)
            label_z = torch.where(here, found, label_z)
            z.scatter_(1, at, torch.where(here, -torch.inf, found)).sub_(highest)
            shifted = z.clamp_min(lowest) if with_entropy else z
            e, fall = z.exp_(), top - highest
            decay = fall.exp()
            if with_entropy:
                spread = decay * (spread + fall * others) + shifted.mul_(e).sum(dim=1, keepdim=True)
            others = decay * others + e.sum(dim=1, keepdim=True)
            if pulled is not None:
                add_product(pulled.mul_(decay), (e if slope is None else e.mul_(slope)).to(self.dtype), w)
            top = highest
        shifted = (label_z - top).clamp_min_(lowest)
        label_e = shifted.exp()
        total = others + label_e
        log_total = total.log()
        if d_rows is not None and pulled is not None:
            # d nll_i / d h_i = scale (sum_{j != y} p_ij slope_ij W_j - (1 - p_iy) slope_iy W_y)
            pull, slope = weight[labels] * others, self.slope(label_z)
            pulled.sub_(pull if slope is None else pull.mul_(slope)).mul_(self.scale / total)
            d_rows.copy_(pulled)
        entropy = log_total - (spread + label_e * shifted) / total if with_entropy else None
        return columns_of(log_total - (label_z - top), top, total, entropy, label_z == top)

    def row_gradient(
        self, z: Tensor, h: Tensor, w: Tensor, b: Part, labels: Tensor, with_entropy: bool
    ) -> tuple[Statistics, Callable[[Tensor], Tensor]]:
        """Statistics of whole rows, and what makes dz_ij = g_i (p_ij - 1[j = y_i]) of g [R]; z is a buffer."""
        self.into(z, h, w, b)
        y = labels[:, None]
        label_z, top, slope = z.gather(1, y), z.amax(dim=1, keepdim=True), self.slope(z)
        shifted = z.sub_(top).clamp_min(torch.finfo(z.dtype).min) if with_entropy else z.sub_(top)
        e = z.exp_()
        total = e.sum(dim=1, keepdim=True)
        log_total = total.log()
        entropy = log_total - shifted.mul_(e).sum(dim=1, keepdim=True) / total if with_entropy else None

        def gradient(g: Tensor) -> Tensor:
            dz = e.mul_(g[:, None] / total).scatter_add_(1, y, -g[:, None])
            return self.before_cap(dz, slope)

        return columns_of(log_total - (label_z - top), top, total, entropy, label_z == top), gradient

    def tile_gradient(self, z: Tensor, tile: Tile, labels: Tensor, found: Statistics, g: Upstream) -> Tensor:
        """dz_ij = g_i (p_ij - 1[j = y_i]) + g_lse_i p_ij - g_entropy_i p_ij (log p_ij + H_i); z is a buffer."""
        self.into(z, tile.h, tile.w, tile.b)
        slope = self.slope(z)
        shifted, share = z.sub_(found.top[:, None]), both(g.nll, g.lse)
        if g.entropy is None:
            assert share is not None
            dz = shifted.exp_().mul_((share / found.total)[:, None])
        else:
            # p is 0 long before log p = -1e4; at -inf their product would be nan.
            bent = (shifted - (found.total.log() - found.entropy)[:, None]).clamp_min_(-1e4)  # log p + H
            bent.mul_(-g.entropy[:, None])
            dz = shifted.exp_().mul_(bent if share is None else bent.add_(share[:, None])).div_(found.total[:, None])
        if g.nll is not None:
            here, at = find_label(labels[:, None], tile.columns)
            dz.scatter_add_(1, at, torch.where(here, -g.nll[:, None].to(dz.dtype), 0.0))
        return self.before_cap(dz, slope)

    def over_tiles(
        self, rows: Tensor, weight: Tensor, bias: Part, needs: Needs, gradient: Callable[[Tensor, Tile], Tensor]
    ) -> Gradients:
        """dH = sum_tiles dz W, dW = dz^T H and db = sum_rows dz, with dz = gradient(buffer [R, C], tile) in `dtype`."""
        h, dtype, held = rows.to(self.dtype), wide(rows), Held(rows)
        d_rows = torch.zeros_like(rows, dtype=dtype) if needs[0] else None
        d_weight = torch.empty_like(weight) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None
        for columns in self.column_tiles(len(rows), len(weight)):
            w, b = weight[columns].to(self.dtype), cast(sub(bias, columns), self.dtype)
            d_w = None
            if d_weight is not None:
                d_w = d_weight[columns].zero_() if weight.dtype == dtype else torch.zeros_like(w, dtype=dtype)
            for part in even_slices(len(rows), ROW_BLOCK):
                tile = Tile(part, columns, h[part], w, b)
                dz = gradient(held.view(len(tile.h), len(w)), tile)
                add_products(dz, tile.h, w, sub(d_rows, part), d_w, sub(d_bias, columns))
            if d_weight is not None and d_w is not None and weight.dtype != dtype:
                d_weight[columns] = d_w
        return cast(d_rows, rows.dtype), d_weight, None if bias is None else cast(d_bias, bias.dtype)

    def tangents(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Part,
        labels: Tensor,
        found: Statistics,
        dots: Gradients,
    ) -> tuple[Tensor, Tensor, Part]:
        """Forward-mode derivatives of nll, lse and (if it is among `found`) entropy, along tangents of the inputs.

        z'_ij = slope_ij scale (h'_i . W_j + h_i . W'_j + b'_j);  lse' = sum_j p_ij z'_ij;  nll' = lse' - z'_{i, y_i};
        entropy' = -sum_j p_ij (log p_ij + H_i) z'_ij.
        """
        dtype, held, held_dot = wide(rows), Held(rows), Held(rows)
        log_total = found.total.log()
        label_dot, lse_dot, entropy_dot = (torch.zeros(len(rows), dtype=dtype, device=rows.device) for _ in range(3))
        rows_dot, weight_dot, bias_dot = (cast(dot, self.dtype) for dot in dots)
        for columns in self.column_tiles(len(rows), len(weight)):
            w, b = weight[columns].to(self.dtype), cast(sub(bias, columns), self.dtype)
            for part in even_slices(len(rows), ROW_BLOCK):
                h = rows[part].to(self.dtype)
                z_dot = held_dot.view(len(h), len(w)).zero_()
                if rows_dot is not None:
                    add_product(z_dot, rows_dot[part], w.t())
                if weight_dot is not None:
                    add_product(z_dot, h, weight_dot[columns].t())
                if bias_dot is not None:
                    z_dot += bias_dot[columns]
                z = self.into(held.view(len(h), len(w)), h, w, b)
                slope = self.slope(z)
                z_dot.mul_(self.scale if slope is None else slope.mul_(self.scale))
                here, at = find_label(labels[part, None], columns)
                label_dot[part] += torch.where(here, z_dot.gather(1, at), 0.0).squeeze(1)
                log_p = z.sub_(found.top[part, None]).sub_(log_total[part, None])
                p_dot = z_dot.mul_(log_p.exp())
                lse_dot[part] += p_dot.sum(dim=1)
                if found.entropy is not None:
                    bent = log_p.add_(found.entropy[part, None]).clamp_min_(-1e4)
                    entropy_dot[part] -= bent.mul_(p_dot).sum(dim=1)
        return lse_dot - label_dot, lse_dot, None if found.entropy is None else entropy_dot


def columns_of(*columns: Part) -> Statistics:
    """Statistics of columns [R, 1]."""
    return Statistics(*(None if x is None else x.squeeze(1) for x in columns))  # type: ignore[arg-type]


def joined(blocks: list[Statistics], like: Tensor, with_entropy: bool) -> Statistics:
    """The statistics of blocks of rows as one, also of none."""
    if not blocks:
        nll, top, total, entropy = (torch.empty(0, dtype=wide(like), device=like.device) for _ in range(4))
        return Statistics(nll, top, total, entropy if with_entropy else None, nll == 0)
    if len(blocks) == 1:
        return blocks[0]
    return Statistics(*(None if column[0] is None else torch.cat(column) for column in zip(*blocks)))  # type: ignore[arg-type]


class Held:
    """One buffer for all tiles of logits: fresh pages for each would cost more than the arithmetic done on them."""

    def __init__(self, like: Tensor) -> None:
        self.flat = torch.empty(0, dtype=wide(like), device=like.device)

    def view(self, rows: int, columns: int) -> Tensor:
        if rows * columns > len(self.flat):
            self.flat = self.flat.new_empty(rows * columns)
        return self.flat[: rows * columns].view(rows, columns)


def wide(like: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def cast(x: Part, dtype: torch.dtype) -> Part:
    return None if x is None else x.to(dtype)


def sub(x: Part, part: slice) -> Part:
    return None if x is None else x[part]


def both(a: Part, b: Part) -> Part:
    return a if b is None else b if a is None else a + b


def even_slices(n: int, most: int) -> Iterator[slice]:
    """[0, n) in the fewest slices of at most `most`, all about as long."""
    count = -(-n // max(1, most))
    for i in range(count):
        yield slice(i * n // count, (i + 1) * n // count)


def find_label(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels [R, 1] stand in these columns, and where there; 0 for the others."""
    here = (labels >= columns.start) & (labels < columns.stop)
    return here, torch.where(here, labels - columns.start, 0)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b."""
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def add_products(dz: Tensor, h: Tensor, w: Tensor, d_rows: Part, d_weight: Part, d_bias: Part) -> None:
    """dH += dz W, dW += dz^T H, db += sum_rows dz."""
    if d_rows is not None:
        add_product(d_rows, dz, w)
    if d_weight is not None:
        add_product(d_weight, dz.t(), h)
    if d_bias is not None:
        d_bias += dz.sum(dim=0, dtype=d_bias.dtype)


class OnlyOnce(torch.autograd.Function):
    """Passes a gradient on and raises if it is differentiated again, whichever way the graph runs."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Part) -> Tensor:  # the further inputs tie it to what it depends on
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ONCE)


ONCE = (
    "this path of linear_cross_entropy and linear_kl can be differentiated once: for a second derivative "
    "(meta-learning) call it with backend='reference'."
)


def once(grad: Part, *inputs: Part) -> Part:
    return OnlyOnce.apply(grad, *inputs) if grad is not None and torch.is_grad_enabled() else grad


def no_autocast(like: Tensor) -> Any:
    return torch.autocast(like.device.type, enabled=False)


class RowLosses(torch.autograd.Function):
    """nll (and statistics) of rows, for any upstream.

    If the head does not train, d nll_i / d h_i is made in the forward and kept as [N, H]; the backward scales it. All
    other gradients make the logits again.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, logits, asked, wants_grad):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        d_rows = torch.empty_like(rows) if wants_grad and ctx.needs_input_grad[0] and not trained else None
        with no_autocast(rows):
            found = logits.statistics(rows, weight, bias, labels, "entropy" in asked, d_rows)
        ctx.logits = logits
        ctx.save_for_forward(rows, weight, bias, labels, *found)
        if wants_grad:
            ctx.save_for_backward(rows, weight, bias, labels, d_rows, *found)
        ctx.mark_non_differentiable(found.is_argmax)
        return found.nll, found.lse, found.entropy, found.is_argmax

    @staticmethod
    def backward(ctx, *gs):  # type: ignore[no-untyped-def]
        rows, weight, bias, labels, d_nll, *statistics = ctx.saved_tensors
        if getattr(ctx, "has_tangent", False):
            raise RuntimeError(ONCE)  # forward over reverse: what the forward made has no tangent
        found, g, logits, needs = Statistics(*statistics), Upstream(*gs[:3]), ctx.logits, ctx.needs_input_grad[:3]

        def gradient(z: Tensor, tile: Tile) -> Tensor:
            part = tile.rows
            return logits.tile_gradient(z, tile, labels[part], found.of(part), rest.of(part))

        with torch.no_grad(), no_autocast(rows):
            rest = g if d_nll is None else g._replace(nll=None)
            grads: Gradients = (None, None, None)
            if any(x is not None for x in rest):
                grads = logits.over_tiles(rows, weight, bias, needs, gradient)
            if d_nll is not None and g.nll is not None:
                grads = (both((d_nll * g.nll[:, None]).to(rows.dtype), grads[0]), None, None)
        return (*(once(grad, rows, weight, bias, *gs[:3]) for grad in grads), None, None, None, None)

    @staticmethod
    def jvp(ctx, *dots):  # type: ignore[no-untyped-def]
        rows, weight, bias, labels, *found = ctx.saved_tensors
        ctx.has_tangent = True
        with torch.no_grad(), no_autocast(rows):
            made = ctx.logits.tangents(rows, weight, bias, labels, Statistics(*found), dots[:3])
        return (*(once(dot, rows, weight, bias) for dot in made), None)


class WeightedRows(torch.autograd.Function):
    """sum_i s_i w_i nll_i for a head that trains, w a rule: every gradient in the forward, scaled in the backward."""

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, factors, logits, asked, weigh):  # type: ignore[no-untyped-def]
        needs, dtype = ctx.needs_input_grad[:3], wide(rows)
        d_rows, d_weight, d_bias = (
            torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip((rows, weight, bias), needs)
        )
        nll = torch.empty(len(rows), dtype=dtype, device=rows.device)
        weights, is_argmax = torch.empty_like(nll), torch.empty_like(nll, dtype=torch.bool)
        entropy = torch.empty_like(nll) if "entropy" in asked else None
        held = Held(rows)
        with torch.no_grad(), no_autocast(rows):
            w, b = weight.to(logits.dtype), cast(bias, logits.dtype)
            for part in even_slices(len(rows), logits.held_rows):
                h = rows[part].to(logits.dtype)
                z = held.view(len(h), len(w))
                found, gradient = logits.row_gradient(z, h, w, b, labels[part], entropy is not None)
                nll[part], is_argmax[part] = found.nll, found.is_argmax
                if entropy is not None:
                    entropy[part] = found.entropy
                weights[part] = weigh(found.nll, found.entropy, found.is_argmax, part.start)
                dz = gradient(weights[part] if factors is None else weights[part] * factors[part])
                add_products(dz, h, w, sub(d_rows, part), d_weight, d_bias)
        summed = weights * nll
        loss = (summed if factors is None else summed * factors).sum()
        grads = (
            None if x is None else cast(d, x.dtype) for d, x in zip((d_rows, d_weight, d_bias), (rows, weight, bias))
        )
        ctx.save_for_backward(*grads, rows, weight)
        ctx.mark_non_differentiable(*(x for x in (nll, entropy, is_argmax, weights) if x is not None))
        return loss, nll, entropy, is_argmax, weights

    @staticmethod
    def backward(ctx, g, *_):  # type: ignore[no-untyped-def]
        *grads, rows, weight = ctx.saved_tensors
        with torch.no_grad():
            # A second [V, H] only if the graph is kept for another backward.
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            scaled = [None if x is None else x * g if keep else x.mul_(g) for x in grads]
        return (*(once(grad, rows, weight, g) for grad in scaled), None, None, None, None, None)


def reference_statistics(
    rows: Tensor, weight: Tensor, bias: Part, labels: Tensor, logits: Logits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy, is_argmax by plain differentiable torch, chunk by chunk under checkpointing."""
    weight, bias = weight.to(wide(rows)), cast(bias, wide(rows))  # so that the chunks' gradients are added up in fp32

    def chunk(part: slice) -> tuple[Tensor, ...]:
        y = labels[part]
        with no_autocast(rows):
            z = logits.of(rows[part], weight, bias)
        log_p = z.log_softmax(dim=1)
        nll = -log_p.gather(1, y[:, None]).squeeze(1)
        return nll, z.logsumexp(dim=1), -(log_p.exp() * log_p).sum(dim=1), z.argmax(dim=1) == y

    chunks = even_slices(len(rows), logits.held // len(weight))
    parts = [checkpointed(chunk, part) for part in chunks] or [chunk(slice(0))]
    nll, lse, entropy, is_argmax = (torch.cat(column) for column in zip(*parts))
    return nll, lse, entropy, is_argmax


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Keeps no more than the arguments for the backward; calls plainly where that is of no use or cannot work."""
    # Checkpointing knows nothing of forward-mode differentiation.
    forward_mode = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    if forward_mode or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)
