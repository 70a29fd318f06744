"""Where a transformer block's attention and feed-forward parts begin and end, for modules that stand beside them.

Read from `roles`: Llama-, GPT-2-, T5- and ViT-style blocks, whose parts are modules of their own; BERT-style ones,
whose last projection shares a module with the dropout, the residual and the norm; and blocks that hold their matrices
directly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_peft.roles import Stack, Weight, transformer_blocks, weights_by_role

Kind = Literal["attention", "cross_attention", "ffn"]


@dataclass(frozen=True)
class Sublayer:
    """One part of a block, by the qualified names of its modules in the network that was asked about.

    Args:
        kind: "attention", "cross_attention" or "ffn" (experts and router included).
        block: The block.
        index: The block's position in its stack, from 0.
        stack: The stack the block is of.
        entry: Module whose first input is what the part reads.
        exit: Module whose output is added to the residual stream (the dropout, where that is a module of its own).
        output: The last projection, `None` for experts in one tensor.
        query: The projection that makes queries (of a fused one, the first rows), `None` for a feed-forward part.
        width: Size of the residual stream.
        norms: Norms that stand beside the entry, one of which may have made its input.
        post_norm: The norm that the sum with the residual goes through inside the same module (BERT), or `None`.
    """

    kind: Kind
    block: str
    index: int
    stack: Stack | None
    entry: str
    exit: str
    output: str | None
    query: str | None
    width: int
    norms: tuple[str, ...]
    post_norm: str | None


def sublayers(network: nn.Module) -> list[Sublayer]:
    """The attention and feed-forward parts of every block, in the blocks' order.

    Raises:
        ValueError: The network has no transformer blocks.
    """
    modules = dict(network.named_modules())
    weights: dict[str, list[Weight]] = {}
    for weight in weights_by_role(network):
        if weight.block is not None and re.match(r"attention|ffn|expert|router", weight.role):
            weights.setdefault(weight.block, []).append(weight)
    found = []
    for name, _ in transformer_blocks(network):
        groups: dict[str, list[Weight]] = {}
        for weight in weights.get(name, []):
            groups.setdefault(_attention_root(weight) if weight.role.startswith("attention") else "", []).append(weight)
        width = _width(modules, groups)
        if width is not None:
            found += [_sublayer(name, root, group, width, modules) for root, group in groups.items()]
    return found


def unwrapped(module: Any) -> Any:
    """The network's own module inside adapters' layers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def out_features(module: nn.Module) -> int:
    """Size of what a projection returns: `nn.Linear`, transformers' Conv1D, bitsandbytes' layers."""
    layer = unwrapped(module)
    return int(layer.out_features if hasattr(layer, "out_features") else layer.nf)


def in_features(module: nn.Module) -> int:
    """Size of what a projection reads."""
    layer = unwrapped(module)
    return int(layer.in_features if hasattr(layer, "in_features") else layer.nx)


def attention_heads(network: nn.Module, attention: str) -> int:
    """Heads of an attention, as the module itself or the network's config says.

    Args:
        network: The network.
        attention: The module's name in it.

    Raises:
        ValueError: Neither says it.
    """
    for source in (unwrapped(network.get_submodule(attention)), getattr(network, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
            heads = getattr(source, name, None)
            if isinstance(heads, int) and heads > 0:
                return heads
    raise ValueError(f"the number of heads of {attention} is not known: neither it nor the network's config names it.")


# -- how --------------------------------------------------------------------------------------------------------------


def _owner(weight: Weight) -> str:
    """The module that holds a weight, an adapter's layer around it included."""
    return re.sub(r"(\.base_layer)+$", "", weight.name.rpartition(".")[0])


def _attention_root(weight: Weight) -> str:
    """Name down to the first segment that says attention: a block may hold self- and cross-attention."""
    segments = weight.name.split(".")
    start = len((weight.block or "").split("."))
    for i in range(start, len(segments)):
        if re.search(r"attn|attention", segments[i], re.IGNORECASE):
            return ".".join(segments[: i + 1])
    return _owner(weight)


def _common(names: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    common: list[str] | None = None
    for name in names:
        segments = name.split(".")
        if common is None:
            common = segments
        common = [a for i, a in enumerate(common) if common[: i + 1] == segments[: i + 1]]
    return re.sub(r"(\.base_layer)+$", "", ".".join(common or []))


def _first(group: list[Weight], pattern: str) -> str | None:
    return next((_owner(w) for w in group if re.fullmatch(pattern, w.role) and not w.is_bias), None)


def _width(modules: dict[str, nn.Module], groups: dict[str, list[Weight]]) -> int | None:
    for group in groups.values():
        output = _first(group, r"attention\.o")
        if output is not None:
            return out_features(modules[output])
    return None


def _below(outer: str, inner: str) -> str:
    """The child of `outer` that holds `inner`."""
    return ".".join(inner.split(".")[: len(outer.split(".")) + 1])


def _child(modules: dict[str, nn.Module], name: str, is_it: type | re.Pattern[str]) -> list[str]:
    """Names of the direct children of a kind."""
    found = []
    for key, child in modules[name].named_children():
        own = unwrapped(child)
        if isinstance(own, is_it) if isinstance(is_it, type) else is_it.search(type(own).__name__):
            found.append(f"{name}.{key}")
    return found


_NORM = re.compile(r"norm", re.IGNORECASE)


def _sublayer(block: str, root: str, group: list[Weight], width: int, modules: dict[str, nn.Module]) -> Sublayer:
    last = _first(group, r"attention\.o|(ffn|expert)\.down")
    query = _first(group, r"attention\.(q|qkv)")
    first = query or _first(group, r"(ffn|expert)\.(gate_up|gate|up)") or _owner(group[0])
    part = _common(_owner(weight) for weight in group)
    entry = exit_ = part
    post_norm = None
    end = _below(part, last) if last is not None and last != part else part
    if end not in (part, last) and _child(modules, end, _NORM):  # BERT: projection, dropout, residual and norm in one
        entry, post_norm = _below(part, first), _child(modules, end, _NORM)[-1]
        exit_ = next(iter(_child(modules, end, nn.Dropout)), last or end)
    elif part == block:
        entry = _below(part, first)
        exit_ = next(iter(_child(modules, end, nn.Dropout)), last or end)
    elif part.rpartition(".")[0] != block:  # T5: the dropout stands beside the part, in a module of the two
        exit_ = next(iter(_child(modules, part.rpartition(".")[0], nn.Dropout)), part)
    cross = re.search(r"cross|enc_?dec|encoder_attn", root[len(block) :], re.IGNORECASE)
    return Sublayer(
        kind="ffn" if not root else "cross_attention" if cross else "attention",
        block=block,
        index=group[0].index or 0,
        stack=group[0].stack,
        entry=entry,
        exit=exit_,
        output=last if last is not None and hasattr(unwrapped(modules[last]), "weight") else None,
        query=query,
        width=width,
        norms=tuple(_child(modules, entry.rpartition(".")[0], _NORM)),
        post_norm=post_norm,
    )
