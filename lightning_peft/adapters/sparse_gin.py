"""Sparse GIN: a graph network that reads a frozen network's attention maps as sparse graphs (paper 3, 2501.02393).

After the attention and its residual, before the feed-forward part, with h the hidden states and P the attention's
probabilities [heads, T, T]:

    A    = sigmoid(10 (min(sum_heads P, 1) - 0.1)), entries up to 0.6 set to 0     raw attention above 0.14 stays
    x    = W_in h
    m_i  = eps x_i + sum_j A_ij x_j                                                eps trained, from 0
    u    = m + W_2 act(W_1 m);  g = RMSNorm(W_out dropout(act(u)))                 act PReLU
    h    <- h + lambda g                                                           lambda trained, one a layer

as the authors' example has it (lamm-mit/Graph-Aware-Transformers, README and `src/xgpt`). The code writes eps, not the
GIN's 1 + eps: the self edge carries the 1. lambda starts at 0 here, so that the network starts unchanged; the example's
start rises from 0 in the first layer to 0.5 in the last (`scale_init=(0.0, 0.5)`).

A trap in the published code: it hands the query's index over as the edge's source and the key's as its target, and
its layer keeps edges with source <= target only; together with the lower triangle that leaves the diagonal, so no token
reads another. Ours sums over keys, row i over j <= i. What attention masks (the future, padding, other documents) has
probability 0 and stays without an edge whatever the thresholds are. The learned combination ends in a sigmoid, as one
of the code's two choices; its default is a softmax over the row.

The network has to run eager attention, which is set when the adapter comes in, as is `use_cache=False`: a graph needs
all rows of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters import add_peft_type, register_with_peft
from lightning_peft.adapters.beside import BesideConfig, BesideLayer, BesideModel, Tap, head, with_head
from lightning_peft.adapters.graph_aware_attention import HeadLinear
from lightning_peft.sublayers import attention_heads, sublayers, unwrapped

COMBINES = ("sum", "mean", "learned")
SPARSE_BELOW = 0.1  # share of edges below which the product over them pays


@dataclass
class SparseGINConfig(BesideConfig):
    """A graph network on the attention maps of every block, beside a frozen network (sparse GIN).

    Args:
        hidden: Size of the graph network.
        combine: How the heads' maps become one: "sum" (at most 1), "mean", or "learned" (a small MLP over heads).
        per_head: A graph network a head, on the head's map and its slice of the hidden states (no norm then).
        sharpness: 10 in sigmoid(10 (A - 0.1)).
        threshold: 0.1 in it.
        keep_above: 0.6, at or below which there is no edge.
        scale_init: lambda at the start in the first and in the last layer, linear between.
        dropout: Dropout in the graph network.
        layers_to_transform: Positions of the blocks that get one, from 0 (in an encoder-decoder, in each of the two
            stacks); by default all.
        modules_to_save: Names of modules that train whole, besides the task's own heads.

    Raises:
        ValueError: A value is out of its range.
    """

    hidden: int = 155
    combine: Literal["sum", "mean", "learned"] = "sum"
    per_head: bool = False
    sharpness: float = 10.0
    threshold: float = 0.1
    keep_above: float = 0.6
    scale_init: tuple[float, float] = (0.0, 0.0)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("sparse_gin")
        if self.combine not in COMBINES:
            raise ValueError(f"combine={self.combine!r} is not known: use one of {COMBINES}.")
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 <= self.keep_above < 1:
            raise ValueError(f"keep_above={self.keep_above} must be at least 0 and below 1, as edges weigh 0 to 1.")
        if self.sharpness <= 0:
            raise ValueError(f"sharpness={self.sharpness} must be above 0.")
        if len(self.scale_init) != 2:
            raise ValueError(f"scale_init={self.scale_init} must be two numbers: for the first layer and the last.")
        self.scale_init = (float(self.scale_init[0]), float(self.scale_init[1]))
        if self.per_head and self.combine == "learned":
            raise ValueError("per_head=True keeps the heads' maps apart: use combine='sum' with it.")


def sharpened(weights: Tensor, sharpness: float, threshold: float, keep_above: float, causal: bool) -> Tensor:
    """Edges from combined attention.

    Args:
        weights: [..., T, T], rows are queries; 0 where attention is masked.
        sharpness: Of the sigmoid.
        threshold: Of the sigmoid.
        keep_above: Edges that weigh more stay.
        causal: Keep the lower triangle only, the diagonal included.

    Returns:
        [..., T, T], mostly zeros.
    """
    edges = torch.sigmoid(sharpness * (weights - threshold))
    edges = torch.where((edges > keep_above) & (weights > 0), edges, 0)
    return edges.tril() if causal else edges


class _SparseProduct(torch.autograd.Function):
    """A x over A's entries that are not zero; the gradient of A at these."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, x: Tensor) -> Tensor:
        n, rows, columns = adjacency.shape
        at = adjacency.nonzero(as_tuple=True)  # (n, row, column), in order
        place = torch.stack([at[0] * rows + at[1], at[0] * columns + at[2]])
        matrix = torch.sparse_coo_tensor(place, adjacency[at], (n * rows, n * columns), is_coalesced=True)
        ctx.save_for_backward(matrix, x, *at)
        ctx.shape = adjacency.shape
        return torch.sparse.mm(matrix, x.reshape(n * columns, -1)).reshape(n, rows, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        (gradient,) = gradients
        matrix, x, *at = ctx.saved_tensors
        for_adjacency = for_x = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            rows, columns = matrix.indices()
            values = torch.empty_like(matrix.values())
            sources = x.reshape(-1, x.shape[-1])
            for part in torch.arange(len(values), device=values.device).split(65_536):  # [edges, width] in pieces
                values[part] = (flat[rows[part]] * sources[columns[part]]).sum(-1)
            for_adjacency = gradient.new_zeros(ctx.shape)
            for_adjacency[tuple(at)] = values
        if ctx.needs_input_grad[1]:
            for_x = torch.sparse.mm(matrix.t(), flat).reshape(x.shape)
        return for_adjacency, for_x


def neighbours(adjacency: Tensor, x: Tensor) -> Tensor:
    """sum_j A_ij x_j, [n, T, width], over the edges alone where they are few.

    Args:
        adjacency: [n, T, T].
        x: [n, T, width].
    """
    # Counting waits for the device; the product over a tenth of the entries saves more.
    few = adjacency.shape[-1] >= 128 and int(adjacency.count_nonzero()) < SPARSE_BELOW * adjacency.numel()
    if few and adjacency.dtype == x.dtype and x.dtype in (torch.float32, torch.float64):
        return _SparseProduct.apply(adjacency, x)
    return adjacency @ x.to(adjacency.dtype)


class SparseGIN(nn.Module):
    """The graph network of one block, or one a head.

    Args:
        width: Size of the hidden states.
        heads: Heads of the attention.
        config: The rest.
        scale: lambda at the start.
        causal: Whether rows read earlier ones only.
    """

    def __init__(self, width: int, heads: int, config: SparseGINConfig, scale: float, causal: bool) -> None:
        super().__init__()
        n, r = (heads if config.per_head else 1), config.hidden
        self.n, self.combine, self.causal = n, config.combine, causal
        self.edges = (config.sharpness, config.threshold, config.keep_above)
        d = width // n
        self.inward, self.outward = HeadLinear(n, d, r), HeadLinear(n, r, d)
        self.first, self.second = HeadLinear(n, r, r), HeadLinear(n, r, r)
        self.eps = nn.Parameter(torch.zeros(n))
        self.activation = nn.PReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.Identity() if config.per_head else nn.RMSNorm(width, eps=1e-5)
        self.scale = nn.Parameter(torch.full((1,), float(scale)))
        if config.combine == "learned":
            self.over_heads = nn.Sequential(
                nn.Linear(heads, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 1), nn.Sigmoid()
            )

    def adjacency(self, attention: Tensor) -> Tensor:
        """Edges [batch, n, T, T] from attention probabilities [batch, heads, T, T]."""
        if self.n > 1:
            return sharpened(attention, *self.edges, self.causal)
        summed = attention.sum(1, keepdim=True)
        if self.combine == "learned":
            combined = self.over_heads(attention.movedim(1, -1)).movedim(-1, 1)
            combined = torch.where(summed > 0, combined, 0)  # masked in every head: never an edge
        else:
            combined = attention.mean(1, keepdim=True) if self.combine == "mean" else summed.clamp(max=1)
        return sharpened(combined, *self.edges, self.causal)

    def forward(self, hidden: Tensor, attention: Tensor) -> Tensor:
        """lambda g, [batch, T, width], in the adapter's own precision."""
        dtype = self.eps.dtype
        adjacency = self.adjacency(attention.to(dtype))
        h = hidden.to(dtype).unflatten(-1, (self.n, -1)).movedim(-2, 1)  # [batch, n, T, width / n]
        x = self.inward(h)
        gathered = neighbours(adjacency.flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
        m = self.eps[:, None, None] * x + gathered
        u = m + self.second(self.activation(self.first(m)))
        g = self.outward(self.dropout(self.activation(u)))
        return self.scale * self.norm(g.movedim(1, -2).flatten(-2))


class Place(NamedTuple):
    """Where a graph network stands.

    Args:
        width: Size of the residual stream.
        heads: Heads of the attention.
        scale: lambda at the start.
        causal: Whether the block is a decoder's.
        entry: The attention, where what it returns lacks the residual; else "".
        norms: Norms before it.
    """

    width: int
    heads: int
    scale: float
    causal: bool
    entry: str
    norms: tuple[str, ...]


class SparseGINLayer(BesideLayer):
    """An attention (with its residual, where that is in the module) with graph networks on its maps beside it."""

    adapter_layer_names = ("sparse_gin_modules",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.taps: list[Tap] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        hidden = head(output)
        residual = self.taps[0].take() if self.taps else None
        for _, graph in self.active():
            attention = output[-1] if isinstance(output, tuple) else None
            if not isinstance(attention, Tensor) or attention.ndim != 4:
                raise ValueError(
                    "sparse GIN reads attention maps and the network returned none: it needs eager attention, as in "
                    "CausalLM(attn_implementation='eager')."
                )
            if attention.shape[-1] != attention.shape[-2] or attention.shape[-2] != hidden.shape[-2]:
                raise ValueError(
                    f"sparse GIN needs whole rows of text: the attention map is {tuple(attention.shape[-2:])} for "
                    f"{hidden.shape[-2]} tokens. Leave the cache out (use_cache=False), and prompt learning."
                )
            stream = hidden if residual is None else residual + hidden
            hidden = hidden + graph(stream, attention).to(hidden.dtype)
        return with_head(output, hidden)


class SparseGINModel(BesideModel):
    """The tuner of `SparseGINConfig`."""

    prefix = "sparse_gin_"
    tuner_layer_cls = layer_class = SparseGINLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        network: Any = model
        if hasattr(network, "set_attn_implementation"):
            network.set_attn_implementation("eager")
        for settings in (getattr(network, "config", None), getattr(network, "generation_config", None)):
            if hasattr(settings, "use_cache"):
                settings.use_cache = False

    def find_places(self, config: SparseGINConfig, network: nn.Module) -> dict[str, Place]:
        parts = [part for part in sublayers(network) if part.kind == "attention"]
        places: dict[str, Place] = {}
        for part in parts:
            if not config.transforms(part.index):
                continue
            layers = 1 + max(other.index for other in parts if other.stack == part.stack)
            scale = linear_scale(config.scale_init, part.index, layers)
            inside = part.entry == part.exit  # Llama: the residual is added outside of the module
            name = part.entry if inside else _around(part.entry, part.exit)
            heads = attention_heads(network, part.entry)
            if config.per_head and part.width % heads:
                raise ValueError(f"per_head=True: {heads} heads do not divide a width of {part.width}.")
            causal = part.stack == "decoder"
            places[name] = Place(part.width, heads, scale, causal, part.entry if inside else "", part.norms)
        return places

    def adapter_for(self, config: SparseGINConfig, place: Place) -> SparseGIN:
        return SparseGIN(place.width, place.heads, config, place.scale, place.causal)

    def connect(self, layer: SparseGINLayer, adapter_name: str, config: SparseGINConfig) -> None:
        place = layer.places[adapter_name]
        if layer.taps or not place.entry:
            return
        tap = Tap()
        layer.taps.append(tap)
        layer.hooks.append(layer.base_layer.register_forward_pre_hook(tap.read, with_kwargs=True))
        for norm in place.norms:
            layer.hooks.append(unwrapped(self.model.get_submodule(norm)).register_forward_hook(tap.norm))


def linear_scale(ends: Sequence[float], index: int, layers: int) -> float:
    """A number that goes linearly from the first layer's to the last's."""
    first, last = ends
    return first + (last - first) * index / max(layers - 1, 1)


def _around(a: str, b: str) -> str:
    """The innermost module that holds both."""
    common = []
    for x, y in zip(a.split("."), b.split(".")):
        if x != y:
            break
        common.append(x)
    return ".".join(common)


register_with_peft()
