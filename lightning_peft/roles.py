"""What each weight of a transformer is for: found by structure and names, through PEFT and LightningModule wrapping."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

ROLES = (
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "qkv")),
    *(f"ffn.{part}" for part in ("up", "gate", "down", "gate_up")),
    *(f"expert.{part}" for part in ("up", "gate", "down", "gate_up")),
    *("norm", "embedding", "head", "router", "adapter", "other"),
)

# What families call the same matrix. Where a word means different things, the part of the block decides (`_in_block`).
_ATTENTION = {
    "q": "q q_proj query query_proj q_lin wq to_q q_a_proj q_b_proj",
    "k": "k k_proj key key_proj k_lin wk to_k",
    "v": "v v_proj value value_proj v_lin wv to_v",
    "qkv": "qkv qkv_proj c_attn query_key_value wqkv in_proj",
    "o": "o o_proj out_proj c_proj dense out_lin wo to_out projection",
}
_FFN = {
    "gate": "gate_proj w1 wi_0 gate linear_v",
    "up": "up_proj c_fc fc1 fc_in wi wi_1 lin1 linear1 dense_h_to_4h w3 intermediate",
    "down": "down_proj c_proj fc2 fc_out wo lin2 linear2 dense_4h_to_h w2 output",
    "gate_up": "gate_up_proj wgate_up",
}
_ATTENTION_NAMES = {name: part for part, names in _ATTENTION.items() for name in names.split()}
_FFN_NAMES = {name: part for part, names in _FFN.items() for name in names.split()}
_ADAPTER = re.compile(r"(^|\.)(lora_|adapter|prompt_encoder|ia3_|vera_|prefix|oft_|boft_|hada_|lokr_|trainable_tokens)")
_WRAPPING = re.compile(r"(base_layer|original_module|modules_to_save\.[^.]+)\.")
_HEADS = {
    "lm_head",
    "embed_out",
    "classifier",
    "score",
    "qa_outputs",
    "cls",
    "head",
    "classification_head",
    "output_layer",
}


@dataclass(frozen=True)
class Weight:
    """One parameter and what it is for.

    Args:
        name: Its name in `network.named_parameters()`.
        role: One of `ROLES`; a bias carries its matrix's.
        block: Qualified name of its transformer block, or None outside of blocks.
        index: The block's place in its stack, from 0.
        stack: "decoder" or "encoder".
        is_bias: It is a bias (of a matrix or of a norm).
    """

    name: str
    role: str
    block: str | None = None
    index: int | None = None
    stack: str | None = None
    is_bias: bool = False


def inner_model(module: nn.Module) -> nn.Module:
    """The network inside a LightningModule or PeftModel: the first transformers network, else `module` itself."""
    return dict(module.named_modules())[_inner_name(module)]


def _inner_name(module: nn.Module) -> str:
    for name, child in module.named_modules():
        if hasattr(child, "config") and hasattr(child, "get_input_embeddings") and not hasattr(child, "peft_config"):
            return name
    return ""


def transformer_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The network's transformer blocks with their qualified names, in order, stack by stack.

    A stack is a list of modules of one class that each hold attention.

    Raises:
        ValueError: There is none; the message says what lists were found.
    """
    found = [(f"{name}.{i}", block) for name, stack in _stacks(network) for i, block in enumerate(stack)]
    if not found:
        lists = [
            f"{n} of {type(m[0]).__name__}" for n, m in network.named_modules() if isinstance(m, nn.ModuleList) and m
        ]
        raise ValueError(
            f"{type(network).__name__} has no transformer blocks (a list of one class of modules that hold attention); found "
            f"{'the lists ' + ', '.join(lists) if lists else 'no lists of modules'}. Give a transformer network."
        )
    return found


def _stacks(network: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    prefix = _inner_name(network)
    inside: list[str] = []
    for name, module in dict(network.named_modules())[prefix].named_modules(prefix=prefix):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(name.startswith(f"{o}.") for o in inside):
            continue
        children = list(module)
        if children and len({type(child) for child in children}) == 1 and _holds_attention(children[0]):
            inside.append(name)
            yield name, module  # type: ignore[misc]


def _holds_attention(block: nn.Module) -> bool:
    parts = [(name, type(child).__name__) for name, child in block.named_modules() if name]
    attends = any("attn" in name.lower() or "attention" in (name + kind).lower() for name, kind in parts)
    # An attention by itself is not a block: a block holds more than its attention.
    return attends and not re.search(r"(Self)?Attention$", type(block).__name__)


def final_norm(network: nn.Module) -> nn.Module | None:
    """The norm after the last block, or None where there is none (BERT)."""
    *_, (name, stack) = _stacks(network)
    parent = dict(network.named_modules())[name.rpartition(".")[0]]
    children = list(parent.named_children())
    place = next(i for i, (_, child) in enumerate(children) if child is stack)
    # It follows its stack, except where it is registered before and called "final" (OPT).
    norms = [(i, name, child) for i, (name, child) in enumerate(children) if _is_norm(child)]
    return next((child for i, name, child in norms if i > place or "final" in name), None)


def weights_by_role(network: nn.Module) -> list[Weight]:
    """Every parameter once (a tied one under its first name), with its role and block.

    Names are those of `network.named_parameters()`, whatever wraps the transformer.
    """
    modules = dict(network.named_modules())
    blocks = {}
    for stack_name, stack in _stacks(network):
        side = _side(stack_name, stack)
        blocks.update({f"{stack_name}.{i}": (i, side) for i in range(len(stack))})
    inner = inner_model(network)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    output_ids = {id(p) for p in output.parameters()} if output is not None else set()
    weights = []
    for name, parameter in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        block = next((b for b in _prefixes(name) if b in blocks), None)
        is_bias = leaf == "bias" or leaf.endswith("_bias")
        plain = _WRAPPING.sub("", name)
        if _ADAPTER.search(plain):
            role = "adapter"
        elif _is_norm(modules[owner]):
            role = "norm"
        elif block is not None:
            role = _in_block(plain[len(_WRAPPING.sub("", block + ".")) :])
        elif id(parameter) in output_ids and not isinstance(modules[owner], nn.Embedding):
            role = "head"
        else:
            role = _outside(plain, modules[owner])
        index, side = blocks[block] if block is not None else (None, None)
        weights.append(Weight(name, role, block, index, side, is_bias))
    return weights


def _side(name: str, stack: nn.Module) -> str:
    for side in ("encoder", "decoder"):
        if side in name.split("."):
            return side
    causal = any(getattr(module, "is_causal", False) is True for module in stack.modules())
    return "decoder" if causal else "encoder"


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _in_block(path: str) -> str:
    """The role of a parameter by its path within the block, such as `self_attn.q_proj.weight`."""
    steps = path.lower().split(".")
    words = [re.sub(r"_(weight|bias)$", "", step) for step in steps if step not in ("weight", "bias")]
    expert = any(step in ("experts", "shared_expert", "shared_experts") for step in steps)
    attends = any("attn" in word or "attention" in word for word in words)
    for word in reversed(words):
        if attends and word in _ATTENTION_NAMES:
            return f"attention.{_ATTENTION_NAMES[word]}"
        if not attends and word == "gate" and not expert and ("moe" in path or words[-1] == "gate"):
            return "router"
        if not attends and word in _FFN_NAMES:
            return f"{'expert' if expert else 'ffn'}.{_FFN_NAMES[word]}"
        if word in ("router", "shared_expert_gate"):
            return "router"
    return "other"


def _outside(path: str, owner: nn.Module) -> str:
    steps = path.lower().split(".")
    if isinstance(owner, nn.Embedding) or any("embed" in step or step in ("wte", "wpe", "cls_token") for step in steps):
        return "embedding"
    return "head" if any(step in _HEADS for step in steps) else "other"
