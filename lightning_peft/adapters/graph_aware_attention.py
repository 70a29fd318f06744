"""Graph-aware attention: attention that aggregates by a graph network (paper 3, arXiv 2501.02393), for small models.

Attention probabilities are taken for the adjacency of a graph over tokens, one a head, and what is done with them is a
graph isomorphism network's (GIN) or principal neighbourhood aggregation's (PNA) instead of a sum of values:

    A    = softmax(alpha Q K^T / sqrt(d))                      alpha trained, from 1, with `sharpening`; causal
    GIN  o_i = MLP(eps x_i + sum_j A_ij x_j)                   x the head's slice of the hidden states, eps from 0
    PNA  o_i = MLP([sum, mean, max, variance of v_j over A])   v = W_v h; a mean is over A's weights, max over A > 0

As coded in lamm-mit/Graph-Aware-Transformers (`Attention_GNN.py`): eps where a GIN has 1 + eps, an MLP a head
(d -> factor d, dropout, RMSNorm, SiLU, -> d; PNA's has no norm), no projection of values in the GIN, an output
projection in the PNA and, if asked for, in the GIN.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AGGREGATIONS, WEIGHTS = ("gin", "pna"), ("softmax", "relu")


class GraphAwareAttention(nn.Module):
    """Self-attention that aggregates by a graph network; called like an attention of transformers' decoders.

    `layer.self_attn = GraphAwareAttention(...)` puts it into a Llama-style network that is trained from scratch.

    Args:
        hidden_size: Width of the hidden states.
        num_heads: Heads; they divide the width.
        aggregation: "gin" or "pna".
        hidden_factor: Size of the MLP of a head, as a multiple of the head's.
        weights: What makes an adjacency of the scores: "softmax" or "relu".
        sharpening: Train alpha, by which scores are multiplied.
        output_projection: A linear layer over the heads' results; the PNA always has one.
        causal: No token reads a later one (where the call brings no mask of its own).
        dropout: Dropout in the MLP.
        attention_dropout: Dropout on the adjacency.

    Raises:
        ValueError: A value is not known or does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        aggregation: Literal["gin", "pna"] = "gin",
        hidden_factor: float = 0.5,
        weights: Literal["softmax", "relu"] = "softmax",
        sharpening: bool = True,
        output_projection: bool = False,
        causal: bool = True,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={aggregation!r} is not known: use one of {AGGREGATIONS}.")
        if weights not in WEIGHTS:
            raise ValueError(f"weights={weights!r} is not known: use one of {WEIGHTS}.")
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}.")
        d = hidden_size // num_heads
        inner = int(hidden_factor * d)
        if inner < 1:
            raise ValueError(f"hidden_factor={hidden_factor} leaves nothing of heads of size {d}.")
        self.num_heads, self.head_dim, self.is_causal = num_heads, d, causal
        self.aggregation, self.weights = aggregation, weights
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.alpha = nn.Parameter(torch.ones(1)) if sharpening else None
        pna = aggregation == "pna"
        self.v_proj: Any = nn.Linear(hidden_size, hidden_size, bias=False) if pna else None
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False) if pna or output_projection else None
        self.eps = None if pna else nn.Parameter(torch.zeros(1, num_heads, 1, 1))
        self.first = HeadLinear(num_heads, 4 * d if pna else d, inner)
        self.norm = None if pna else nn.Parameter(torch.ones(num_heads, 1, inner))
        self.second = HeadLinear(num_heads, inner, d)
        self.dropout, self.attention_dropout = nn.Dropout(dropout), nn.Dropout(attention_dropout)

    def adjacency(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """A, [batch, heads, T, T], in fp32."""
        q, k = (self.split(projection(hidden)) for projection in (self.q_proj, self.k_proj))
        if rotation is not None:
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            q, k = apply_rotary_pos_emb(q, k, *rotation)
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(self.head_dim)
        if self.alpha is not None:
            scores = scores * self.alpha.float()
        if mask is None:
            time = scores.shape[-1]
            allowed = scores.new_ones(time, time, dtype=torch.bool)
            mask = allowed.tril() if self.is_causal else allowed
        scores = scores + mask if mask.dtype.is_floating_point else scores.masked_fill(~mask, float("-inf"))
        # A row that may read nothing (padding) has no edges.
        return scores.softmax(-1).nan_to_num(0.0) if self.weights == "softmax" else scores.relu()

    def split(self, x: Tensor) -> Tensor:
        """[batch, heads, T, size of a head] from [batch, T, width]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Result [batch, T, width] and adjacency [batch, heads, T, T].

        Args:
            hidden_states: [batch, T, width].
            position_embeddings: Cosines and sines of rotary positions, as transformers makes them.
            attention_mask: [batch, 1, T, T], boolean (True may be read) or additive.
            **kwargs: What else transformers passes; a cache is refused.

        Raises:
            ValueError: There is a cache: a graph network needs the whole text.
        """
        if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError("GraphAwareAttention takes no cache: call the network with use_cache=False.")
        edges = self.adjacency(hidden_states, position_embeddings, attention_mask)
        kept = self.attention_dropout(edges).to(hidden_states.dtype)
        if self.aggregation == "gin":
            x = self.split(hidden_states)
            x = self.first(self.eps * x + kept @ x)
            x = self.dropout(x)
            x = F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.norm
        else:
            x = self.dropout(self.first(self.moments(kept, self.split(self.v_proj(hidden_states)))))
        out = self.second(F.silu(x)).transpose(1, 2).flatten(-2)
        return (out if self.o_proj is None else self.o_proj(out)), edges

    @staticmethod
    def moments(edges: Tensor, x: Tensor, rows: int = 64) -> Tensor:
        """Sum, mean, maximum and variance of x over each row's edges, [batch, heads, T, 4 d].

        Args:
            edges: [batch, heads, T, T], not negative.
            x: [batch, heads, T, d].
            rows: Rows whose maximum is taken at once: [batch, heads, rows, T, d] are held.
        """
        total = edges @ x
        degree = edges.sum(-1, keepdim=True)
        degree = torch.where(degree == 0, 1, degree)
        mean = total / degree
        variance = (edges @ x.square() / degree - mean.square()).clamp(min=0)
        highest = [
            x[:, :, None].masked_fill(~(part > 0)[..., None], float("-inf")).amax(-2) for part in edges.split(rows, -2)
        ]
        largest = torch.cat(highest, -2)
        return torch.cat([total, mean, torch.where(largest.isfinite(), largest, 0), variance], -1)


class HeadLinear(nn.Module):
    """A linear layer a head, [batch, heads, T, width] to [batch, heads, T, out], that starts as `nn.Linear` does.

    Args:
        heads: Heads.
        width: Size of a head's input.
        out: Size of its output.
    """

    def __init__(self, heads: int, width: int, out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(heads, width, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """x W + b, a head at a time."""
        return x @ self.weight + self.bias
