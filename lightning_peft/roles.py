"""What each weight of a transformer is for, read from structure and names, through PEFT and Lightning wrapping.

One home for all techniques that act on "the query matrices", "the FFN's down projection" or "block 3": Llama-, GPT-2-,
BERT-, T5-, ViT- and MoE-style networks, those of transformers 5 with fused expert tensors, and plain PyTorch ones.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_peft.parts import leaves_of

Stack = Literal["decoder", "encoder"]
Layout = Literal["out_in", "in_out"]

#: All roles. A fused projection of several of q, k and v is "attention.qkv", one of gate and up "ffn.gate_up"; "other"
#: is the network's, "beside" what stands beside it in a LightningModule.
ROLES = (
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "qkv")),
    *(f"ffn.{part}" for part in ("up", "gate", "down", "gate_up")),
    "norm",
    "embedding",
    "head",
    "router",
    *(f"expert.{part}" for part in ("up", "gate", "down", "gate_up")),
    "adapter",
    "other",
    "beside",
)


@dataclass(frozen=True)
class Weight:
    """One parameter and what it is for.

    Args:
        name: Qualified name in the network that was asked about.
        role: One of `ROLES`; a bias has its matrix's role.
        block: Qualified name of the transformer block it lies in, such as "model.layers.3".
        index: The block's position in its stack, from 0.
        stack: The stack the block is of.
        is_bias: Whether it is a bias (a norm's too).
        shape: Its shape as it is stored, of a sharded one as a whole.
        layout: How a linear layer stores its matrix, "out_in" (`nn.Linear`) or "in_out" (transformers' Conv1D); `None`
            for what is no linear layer's matrix.
    """

    name: str
    role: str
    block: str | None = None
    index: int | None = None
    stack: Stack | None = None
    is_bias: bool = False
    shape: tuple[int, ...] = ()
    layout: Layout | None = None


# Names that wrappers put into a path: torch.compile, activation checkpointing, DDP, PEFT, parametrizations.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "base_layer"}
_WRAPPERS |= {"original_module", "parametrizations", "original", "original0", "original1", "weight", "bias"}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NORM = re.compile(r"norm|layrnorm|^ln_?(\d+|f)?$|(^|_)ln(_|$)", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$|_token$|^cls_token|^register_tokens", re.IGNORECASE)
_HEAD = re.compile(r"(^|_)head|classifier|^score$|^qa_outputs$|^cls$|^predictions$", re.IGNORECASE)
_PARTS: dict[str, tuple[tuple[str, re.Pattern[str]], ...]] = {
    "attention": (
        ("qkv", re.compile(r"qkv|query_key_value|^c_attn$|^in_proj$|^W_pack$|^kv(_|$)", re.IGNORECASE)),
        ("q", re.compile(r"^(to_)?q($|_)|^query|^wq($|_)", re.IGNORECASE)),
        ("k", re.compile(r"^(to_)?k($|_)|^key|^wk($|_)", re.IGNORECASE)),
        ("v", re.compile(r"^(to_)?v($|_)|^value|^wv($|_)", re.IGNORECASE)),
        ("o", re.compile(r"^o($|_)|^(to_)?out($|_)|^dense$|^c_proj$|^proj$|^wo$", re.IGNORECASE)),
    ),
    "ffn": (
        ("gate_up", re.compile(r"gate_up|up_gate")),
        ("gate", re.compile(r"gate|^wi_0$|^w1$")),
        (
            "up",
            re.compile(
                r"up(_|$)|^c_fc$|h_to_4h|^fc_?(1|in)$|^(lin|linear)_?1$|^wi(_1)?$|^Wi$|^w3$|^v1$|^intermediate$"
            ),
        ),
        ("down", re.compile(r"down|^c_proj$|4h_to_h|^fc_?(2|out)$|^(lin|linear)_?2$|^wo$|^Wo$|^w2$")),
    ),
}


def inner_model(module: nn.Module) -> nn.Module:
    """The network itself: the transformers model inside a LightningModule, a PeftModel, DDP or torch.compile.

    A LightningModule that holds several transformers models gives the one it calls `model`, or else itself; one without
    any gives its only child with parameters, or else itself.
    """
    for wrapped in ("module", "_orig_mod"):
        if type(module).__name__ in ("DistributedDataParallel", "OptimizedModule") and wrapped in module._modules:
            return inner_model(getattr(module, wrapped))
    peft_model = getattr(sys.modules.get("peft"), "PeftModel", None)  # another thread may be importing peft
    if peft_model is not None and isinstance(module, peft_model):
        return inner_model(module.get_base_model())
    if not _is_lightning(module):
        return module
    found = _pretrained_inside(module)
    if not found:
        found = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    chosen = found["model"] if "model" in found else next(iter(found.values())) if len(found) == 1 else None
    return module if chosen is None else inner_model(chosen)


def transformer_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order (an encoder's before its decoder's), with their names in `network`.

    A block is an element of a `ModuleList` or `Sequential` whose elements hold both attention and a feed-forward part.

    Raises:
        ValueError: There are none; the message lists the repeated modules that were found.
    """
    inner = inner_model(network)
    start = next((name for name, module in network.named_modules() if module is inner), "")
    lists = [
        (_join(start, name), m) for name, m in inner.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)
    ]
    found = [(name, m) for name, m in lists if any(_is_block(child) for child in m.children())]
    # The innermost: a list of whole towers is not a list of blocks.
    found = [(n, m) for n, m in found if not any(other.startswith(f"{n}.") for other, _ in found)]
    blocks = [(_join(name, key), child) for name, m in found for key, child in m.named_children()]
    if not blocks:
        seen = [f"{n or '(root)'}: {len(m)} x {type(m[0]).__name__}" for n, m in lists if len(m)]
        raise ValueError(
            f"{type(inner).__name__} has no transformer blocks: none of its module lists holds elements with both "
            f"attention and a feed-forward part. Module lists found: {'; '.join(seen) or 'none'}; other children: "
            f"{', '.join(f'{n} ({type(c).__name__})' for n, c in inner.named_children()) or 'none'}."
        )
    return blocks


def weights_by_role(network: nn.Module, need_blocks: bool = True) -> list[Weight]:
    """Every parameter of `network` once, in `named_parameters` order; tied parameters under their first name.

    Leaves that a selection trains in a weight's place (`lightning_peft.parts`) are not listed.

    Args:
        network: A network, wrapped or not, or the LightningModule around it.
        need_blocks: Raise for a network without transformer blocks; else its weights are of no block.

    Raises:
        ValueError: The network has no transformer blocks.
    """
    try:
        blocks = transformer_blocks(network)
    except ValueError:
        if need_blocks:
            raise
        blocks = []
    modules, inner = dict(network.named_modules()), inner_model(network)
    heads = _output_embeddings(inner)
    places: dict[str, tuple[int, Stack | None]] = {}
    for name, block in blocks:
        index = sum(other.rpartition(".")[0] == name.rpartition(".")[0] for other in places)
        places[name] = (index, _stack_of(name, block, inner))
    weights = []
    for name, parameter in network.named_parameters():
        inside: str | None = next((b for b in _prefixes(name) if b in places), None)
        owner = modules[name.rpartition(".")[0]]
        if name.rpartition(".")[2] in leaves_of(owner):
            continue
        is_bias = name.rpartition(".")[2] == "bias" or name.endswith("_bias")
        if _is_added(name, modules):
            role = "adapter"
        elif inside is not None:
            role = _role_in_block(name[len(inside) + 1 :], parameter, modules[inside], owner)
        else:
            role = "head" if owner in heads else _role_outside(name, owner, inner, modules)
        index, stack = places[inside] if inside is not None else (None, None)  # type: ignore[assignment]
        shape, layout = tuple(parameter.shape), None if is_bias else _layout(owner, parameter)
        weights.append(Weight(name, role, inside, index, stack, is_bias, shape, layout))
    return weights


def has_tied_head(network: nn.Module | None) -> bool:
    """Whether the output matrix is the embedding's own parameter; a network with neither has none."""
    inner = None if network is None else inner_model(network)
    if inner is None or not hasattr(inner, "get_output_embeddings"):
        return False
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def final_norm(network: nn.Module) -> nn.Module | None:
    """The norm between the last block and the head (an encoder-decoder's decoder's); `None` where there is none."""
    modules = dict(network.named_modules())
    name = transformer_blocks(network)[-1][0]
    for ancestor in [*list(_prefixes(name))[1:], ""]:
        norms = [
            child
            for key, child in modules[ancestor].named_children()
            if _is_norm(key, child) and not re.search(r"emb|pre_", key)
        ]
        if norms:
            return norms[-1]
    return None


# -- structure ----------------------------------------------------------------------------------------------------


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _prefixes(name: str) -> Any:
    """`a.b.c`, then `a.b`, then `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _pretrained_inside(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers (or PEFT) models below `module`, by name."""
    classes = [
        getattr(sys.modules[package], name)
        for package, name in (("transformers", "PreTrainedModel"), ("peft", "PeftModel"))
        if package in sys.modules and hasattr(sys.modules[package], name)
    ]
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(prefix in found for prefix in _prefixes(name))
        if name and not inside and any(isinstance(child, cls) for cls in classes):
            found[name] = child
    return found


def _is_norm(key: str, module: nn.Module) -> bool:
    return bool(re.search(r"norm", type(module).__name__, re.IGNORECASE)) or (
        bool(_NORM.search(key)) and not list(module.children())
    )


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds attention and, outside it, a matrix that is not a norm's (a feed-forward part)."""
    attention = [name for name, child in module.named_modules() if name and _is_attention(name, child)]
    if not attention:
        return False
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and not any(name.startswith(f"{a}.") for a in attention):
            return True
    return False


def _is_attention(name: str, module: nn.Module) -> bool:
    key = name.rpartition(".")[2]
    named = _ATTENTION.search(key) or _ATTENTION.search(type(module).__name__)
    return bool(named) and not _is_norm(key, module) and not isinstance(module, nn.Dropout | nn.Linear)


def _stack_of(name: str, block: nn.Module, inner: nn.Module) -> Stack | None:
    segments = name.split(".")
    if "decoder" in segments:
        return "decoder"
    if "encoder" in segments and "Decoder" not in type(block).__name__:
        return "encoder"
    causal = [m.is_causal for m in block.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if causal:
        return "decoder" if any(causal) else "encoder"
    names = f"{type(block).__name__} {type(inner).__name__}".lower()
    return "decoder" if "decoder" in names or "causal" in names else "encoder" if "encoder" in names else None


def _output_embeddings(network: nn.Module) -> list[nn.Module]:
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    return [] if head is None else [head, *head.modules()]


def _is_added(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether PEFT put the parameter there: beside a `base_layer` or an `original_module`, or a prompt."""
    segments = name.split(".")
    if "prompt_encoder" in segments:
        return True
    for i, segment in enumerate(segments):
        children = modules.get(".".join(segments[:i]), nn.Module())._modules
        if segment not in ("base_layer", "original_module") and {"base_layer", "original_module"} & set(children):
            return True
    return False


# -- roles --------------------------------------------------------------------------------------------------------


def _segments(path: str) -> list[str]:
    """The names that say something: without wrappers, list positions and the parameter's own `weight` or `bias`."""
    parts = [re.sub(r"_(weight|bias)$", "", part) for part in path.split(".")]
    return [part for part in parts if part not in _WRAPPERS and not part.isdigit()]


def _role_in_block(path: str, parameter: Tensor, block: nn.Module, owner: nn.Module) -> str:
    segments = _segments(path)
    leaf = segments[-1] if segments else ""
    if _is_norm(leaf, owner):
        return "norm"
    if any(_ATTENTION.search(segment) for segment in segments):
        part = next((p for p, pattern in _PARTS["attention"] if pattern.search(leaf)), None)
        return f"attention.{part}" if part else "other"
    expert = any(re.fullmatch(r"experts?", segment) for segment in segments)
    if not expert and _is_router(path, segments, block, owner):
        return "router"
    if parameter.ndim < 2 and not path.endswith("bias"):
        return "other"  # layer scales and the like
    part = _ffn_part(segments, path, block, owner, parameter)
    return "other" if part is None else f"{'expert' if expert else 'ffn'}.{part}"


def _is_router(path: str, segments: list[str], block: nn.Module, owner: nn.Module) -> bool:
    if any(re.search(r"router|(^|_)expert_gate$", segment) for segment in segments):
        return True
    if segments[-1] not in ("gate", "wg"):
        return False
    # `gate` alone may be an FFN's gate: a router stands beside experts.
    above = block
    for part in path.split(".")[: path.split(".").index(segments[-1])]:
        above = getattr(above, part)
    return any("expert" in key for key, _ in above.named_children())


def _ffn_part(segments: list[str], path: str, block: nn.Module, owner: nn.Module, parameter: Tensor) -> str | None:
    leaf = segments[-1]
    if leaf == "dense" and len(segments) > 1:  # BERT: intermediate.dense and output.dense
        leaf = {"intermediate": "up_proj", "output": "down_proj"}.get(segments[-2], leaf)
    part = next((p for p, pattern in _PARTS["ffn"] if pattern.search(leaf)), None)
    siblings = {s[-1] for s in (_segments(name) for name, _ in block.named_parameters()) if s}
    if part == "gate" and leaf == "w1" and not siblings & {"w3", "v1"}:
        part = "up"
    weight = getattr(owner, "weight", None)
    matrix = weight if isinstance(weight, Tensor) else parameter
    if part is None:  # an unknown name: by shape, widening is up and narrowing is down
        out, width = _out_in(owner, matrix)
        part = "up" if out > width else "down" if out < width else None
    if part == "up" and not any(re.search(r"gate|wi_0|^w1$", s) for s in siblings):
        part = "gate_up" if _feeds_half(owner, matrix, block) else "up"
    return part


def _out_in(owner: Any, matrix: Tensor) -> tuple[int, int]:
    if hasattr(owner, "out_features") and hasattr(owner, "in_features"):
        return int(owner.out_features), int(owner.in_features)
    if matrix.ndim < 2:
        return 0, 0
    out, width = matrix.shape[-2:]
    return (width, out) if type(owner).__name__ == "Conv1D" else (out, width)


def _layout(owner: nn.Module, parameter: Tensor) -> Layout | None:
    # nn.MultiheadAttention reads its output projection's weight without calling it.
    if parameter.ndim != 2 or type(owner).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    if isinstance(owner, nn.Linear):
        return "out_in"
    return "in_out" if type(owner).__name__ in ("Conv1D", "FSDPConv1D") else None


def _feeds_half(owner: nn.Module, matrix: Tensor, block: nn.Module) -> bool:
    """Whether the matrix's output is gate and up together: the next one narrows from half its width (ModernBERT)."""
    out, hidden = _out_in(owner, matrix)
    owners: list[Any] = [m for m in block.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    narrowing = {_out_in(m, m.weight) for m in owners}
    return (hidden, out // 2) in narrowing and (hidden, out) not in narrowing


def _role_outside(name: str, owner: nn.Module, inner: nn.Module, modules: dict[str, nn.Module]) -> str:
    segments = _segments(name)
    leaf = segments[-1] if segments else ""
    if not any(modules.get(prefix) is inner for prefix in [*_prefixes(name), ""]):
        return "beside"  # auxiliary heads, metrics
    if _is_norm(leaf, owner):
        return "norm"
    if isinstance(owner, nn.Embedding) or any(_EMBEDDING.search(segment) for segment in segments):
        return "embedding"
    named = any(_HEAD.search(segment) for segment in segments) or leaf in ("decoder", "output")
    return "head" if named else "other"
