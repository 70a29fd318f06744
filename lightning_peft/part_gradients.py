"""A weight whose gradient goes to a part of it alone, whoever computes with it.

A layer that trains a part computes with a `PartWeight` in its weight's place: the same numbers, but `F.linear`,
Conv1D's product, indexing and grouped products make the part's gradient and nothing else of the weight's, and keep only
the inputs that it is made of. For y = W x with rows of tokens X [T, in] and dY [T, out]:

    columns p of W   dY^T X[:, p]       [out, n], keeps X[:, p]
    rows p of W      dY[:, p]^T X       [n, in],  keeps X
    experts p of W   X_e^T dY_e, or its transpose, for e in p, over the rows X_e that were sent to e

Whatever else is done with the weight is differentiated as ever, and the part is cut out of the whole gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from lightning_peft.parts import Part

_transpositions = (Tensor.transpose, torch.transpose, Tensor.swapaxes, Tensor.swapdims)
_grouped = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]


class PartWeight(torch.Tensor):
    """Stands for a weight during its layer's forward; made by `stand_in`."""

    weight: Tensor
    leaf: Tensor
    part: Part
    transposed: bool
    used: list[bool]
    blocks: list[Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = _special(func, args, kwargs)
        if made is not None:
            return made
        if func in _harmless or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_map(_whole, args), **_map(_whole, kwargs))


#: What only looks at a tensor. Reading an attribute ("__get__") is another.
_harmless = {Tensor.size, Tensor.dim, Tensor.stride, Tensor.data_ptr, Tensor.numel, Tensor.is_floating_point}
_harmless |= {Tensor.is_contiguous, Tensor.element_size, Tensor.is_complex, Tensor.get_device, Tensor.__len__}


def stand_in(weight: Tensor, leaf: Tensor, part: Part) -> PartWeight:
    """What a layer computes with: `weight`, whose part's gradient goes to `leaf`.

    Args:
        weight: The frozen weight; the part's current values stand in it.
        leaf: The trainable leaf, of the part's shape.
        part: Which entries.
    """
    return _made(weight, leaf, part, False, [False], [])


def _made(
    weight: Tensor, leaf: Tensor, part: Part, transposed: bool, used: list[bool], blocks: list[Tensor]
) -> PartWeight:
    seen = weight.detach().transpose(-2, -1) if transposed else weight.detach()
    stand = torch.Tensor._make_subclass(PartWeight, seen)
    stand.weight, stand.leaf, stand.part, stand.transposed = weight, leaf, part, transposed
    stand.used, stand.blocks = used, blocks
    return stand


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _whole(value: Any) -> Any:
    """The weight as a differentiable tensor, for operations that have no form of their own here."""
    if not isinstance(value, PartWeight):
        return value
    value.used[0] = True
    whole = CutOut.apply(value.leaf, value.weight.detach(), value.part)
    return whole.transpose(-2, -1) if value.transposed else whole


def _special(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation that makes the part's gradient alone; None for any other."""
    if func is F.linear:
        x, w = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if isinstance(w, PartWeight) and w.weight.ndim == 2 and not w.transposed:
            return _linear(x, w, bias, stored_in_out=False)
    elif func is torch.addmm and isinstance(args[-1], PartWeight) and len(args) == 3 and not kwargs:
        bias, x, w = args  # Conv1D
        if bias.ndim == 1 and not w.transposed:
            return _linear(x, w, bias, stored_in_out=True)
    elif func is Tensor.__getitem__ and isinstance(args[0], PartWeight) and args[0].part.dim == 0:
        return _chosen(args[0], args[1])
    elif func in _transpositions and isinstance(args[0], PartWeight) and args[0].weight.ndim == 3:
        if {args[1] % 3, args[2] % 3} == {1, 2}:
            w = args[0]
            return _made(w.weight, w.leaf, w.part, not w.transposed, w.used, w.blocks)
    elif func in _grouped and func is not None:
        x, w = args[0], args[1] if len(args) > 1 else kwargs["mat2"]
        offs = args[2] if len(args) > 2 else kwargs.get("offs")
        if isinstance(w, PartWeight) and w.part.dim == 0 and x.ndim == 2 and offs is not None:
            w.used[0] = True
            return PartGrouped.apply(x, w.weight, w.leaf, w.part, w.transposed, offs, func)
    return None


def _linear(x: Tensor, w: PartWeight, bias: Tensor | None, stored_in_out: bool) -> Tensor:
    w.used[0] = True
    return PartLinear.apply(x, w.weight, _whole(bias), w.leaf, w.part, stored_in_out)  # of a bias a part may train too


def _chosen(w: PartWeight, index: Any) -> Tensor | None:
    """weight[e] of one expert, or weight[ids] of many."""
    if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool):
        place = w.part.place_of.get(int(index) % w.weight.shape[0])
        if place is None:
            chosen = w.weight.detach()[index]
        else:
            w.used[0] = True
            if not w.blocks:
                w.blocks.extend(w.leaf.unbind(0))  # once: each block's own view of the leaf, one gradient for all
            chosen = w.blocks[place]
        return chosen.transpose(-2, -1) if w.transposed else chosen
    if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long and not w.transposed:
        w.used[0] = True
        return PartGather.apply(w.weight, w.leaf, w.part, index)
    return None


class CutOut(torch.autograd.Function):
    """The weight itself; of its gradient the part is kept."""

    @staticmethod
    def forward(ctx, leaf, weight, part):  # type: ignore[no-untyped-def]
        ctx.part, ctx.dtype = part, leaf.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.part.take(grad).to(ctx.dtype, copy=True), None, None


class Tie(torch.autograd.Function):
    """Passes an output on and gives a leaf that took no part in it a gradient of zeros, as a whole weight would get."""

    @staticmethod
    def forward(ctx, output, leaf):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(leaf)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (leaf,) = ctx.saved_tensors
        return grad, torch.zeros_like(leaf)


class PartLinear(torch.autograd.Function):
    """y = x W^T + b with W [out, in], or x W + b with W [in, out] (Conv1D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, leaf, part, stored_in_out):  # type: ignore[no-untyped-def]
        ctx.part, ctx.stored_in_out, ctx.x_shape, ctx.x_dtype = part, stored_in_out, x.shape, x.dtype
        ctx.leaf_dtype, ctx.bias_dtype = leaf.dtype, None if bias is None else bias.dtype
        y = torch.addmm(bias, x, weight) if stored_in_out else F.linear(x, weight, bias)
        # Read here: in the backward autocast is off, and its products must be those of the forward (FINDINGS, 21).
        ctx.dtype = y.dtype
        kept = None
        if ctx.needs_input_grad[3]:
            kept = part.kept_inputs(x.reshape(-1, x.shape[-1]), y.dtype, weight.shape, stored_in_out)
        ctx.save_for_backward(weight, kept)  # the weight by reference
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight, kept = ctx.saved_tensors
        dx = d_bias = d_leaf = None
        dy = dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            w = weight.to(ctx.dtype)
            dx = (dy @ (w.t() if ctx.stored_in_out else w)).view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            d_bias = dy.sum(0).to(ctx.bias_dtype)
        if kept is not None:
            d_leaf = ctx.part.gradient(dy, kept.to(ctx.dtype), weight.shape, ctx.stored_in_out).to(ctx.leaf_dtype)
        return dx, None, d_bias, d_leaf, None, None


class PartGather(torch.autograd.Function):
    """weight[ids], [S, ...], for a part along the first dimension."""

    @staticmethod
    def forward(ctx, weight, leaf, part, ids):  # type: ignore[no-untyped-def]
        ctx.leaf_shape, ctx.leaf_dtype = leaf.shape, leaf.dtype
        places = part.places(weight.shape[0], ids.device)[ids]  # [S], -1 for what is frozen
        ctx.save_for_backward(places)
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (places,) = ctx.saved_tensors
        rows = (places >= 0).nonzero().squeeze(1)
        d_leaf = grad.new_zeros(ctx.leaf_shape).index_add_(0, places[rows], grad[rows])
        return None, d_leaf.to(ctx.leaf_dtype), None, None


class PartGrouped(torch.autograd.Function):
    """Products by group: rows of x [S, k] up to offs[e] meet expert e's matrix, y [S, n]."""

    @staticmethod
    def forward(ctx, x, weight, leaf, part, transposed, offs, grouped_mm):  # type: ignore[no-untyped-def]
        ctx.part, ctx.transposed, ctx.grouped_mm = part, transposed, grouped_mm
        ctx.leaf_shape, ctx.leaf_dtype, ctx.x_dtype = leaf.shape, leaf.dtype, x.dtype
        ctx.spans, kept = [], None
        if ctx.needs_input_grad[2]:
            ends = offs.tolist()
            ctx.spans = [(ends[e - 1] if e else 0, ends[e]) for e in part.index.tolist()]
            kept = torch.cat([x[start:end] for start, end in ctx.spans])  # the rows of experts that train
        ctx.save_for_backward(weight, offs, kept)
        return grouped_mm(x, weight.transpose(-2, -1) if transposed else weight, offs=offs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight, offs, kept = ctx.saved_tensors
        dx = d_leaf = None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx = ctx.grouped_mm(dy, weight if ctx.transposed else weight.transpose(-2, -1), offs=offs).to(ctx.x_dtype)
        if kept is not None:
            d_leaf = dy.new_zeros(ctx.leaf_shape)
            begin = 0
            for place, (start, end) in enumerate(ctx.spans):
                x_e, dy_e = kept[begin : begin + end - start], dy[start:end]
                begin += end - start
                torch.mm(*((dy_e.t(), x_e) if ctx.transposed else (x_e.t(), dy_e)), out=d_leaf[place])
            d_leaf = d_leaf.to(ctx.leaf_dtype)
        return dx, None, d_leaf, None, None, None, None
