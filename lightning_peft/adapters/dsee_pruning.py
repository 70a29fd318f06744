"""The masks S1 of DSEE (arXiv 2111.00160): entries below one threshold, or an attention's least changed heads.

Both read the network as it is after the first stage of training and fill the masks of its `dsee` adapter. With update
U V + S2 and s = alpha / r, a matrix's score is

    entries, adapted matrices     |W + s (U V + S2)| ("WABS"), |s (U V + S2)| ("ABS")
    entries, all others           |W|
    heads                         sum over the rows of a head of |U V + S2| of queries and values, "WABS" + |W| of both

The authors' "WABS" for entries scales S2 but, by precedence, not U V; here both are, as they act. Their heads' scores
are unscaled, and so are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.adapters.dsee import Attention, DSEELayer, attentions, dsee_layers, packed, unpacked
from lightning_peft.adapters.injection import adapters_of, tuner_of
from lightning_peft.network_record import base_of
from lightning_peft.sublayers import unwrapped

SCORES = ("WABS", "ABS")


def whole(tensor: Tensor) -> Tensor:
    """A tensor in fp32, of a sharded one all of it (a collective call)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).float()


def update(layer: DSEELayer, adapter_name: str) -> Tensor:
    """U V + S2, [out, in]."""
    made = whole(layer.dsee_U[adapter_name]) @ whole(layer.dsee_V[adapter_name])
    rows, columns = layer.dsee_positions[adapter_name]
    made[rows, columns] += whole(layer.dsee_S[adapter_name])
    return made


def pretrained(layer: DSEELayer) -> Tensor:
    """W in fp32, [out, in]."""
    if layer.quantization_backend is not None:
        return layer.pretrained().float()
    weight = whole(layer.get_base_layer().weight)  # type: ignore[arg-type]
    return weight.t() if layer.stored_in_out else weight


def is_pruned(network: nn.Module, adapter_name: str) -> bool:
    """Whether any mask of the adapter takes something away."""
    layers = dsee_layers(network, adapter_name).values()
    return any(not masks.blank.get(adapter_name, True) for x in layers for masks in (x.dsee_mask, x.dsee_columns))


# -- entries ----------------------------------------------------------------------------------------------------------


def entry_scores(layer: DSEELayer, adapter_name: str, score: str) -> Tensor:
    """Score of every entry, [out, in]."""
    if adapter_name not in layer.dsee_U:
        return pretrained(layer).abs()
    change = layer.scaling[adapter_name] * update(layer, adapter_name)
    return (pretrained(layer) + change if score == "WABS" else change).abs()


def smallest(scores: Callable[[], Iterator[Tensor]], k: int) -> tuple[int, int]:
    """Where the k smallest of many scores end, without holding more than one tensor of them.

    Numbers of at least 0 are ordered as their bits are: their first 16 are counted, then the others of those that share
    the k-th smallest's first.

    Args:
        scores: Gives the tensors anew, fp32, none of them negative.
        k: How many, at least 1.

    Returns:
        The bits of the k-th smallest score, and how many scores that equal it are among the k.
    """
    prefix, left = 0, k
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for tensor in scores():
            bits = _bits(tensor)
            bits = bits if shift else bits[(bits >> 16) == prefix]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        digit = int(torch.searchsorted(reached, left))
        left -= int(reached[digit] - counts[digit])
        prefix = (prefix << 16) | digit
    return prefix, left


def _bits(scores: Tensor) -> Tensor:
    return scores.contiguous().view(torch.int32).flatten()


@torch.no_grad()
def prune_entries(network: nn.Module, adapter_name: str, sparsity: float, others: float, score: str = "WABS") -> None:
    """Takes the entries of lowest score away, by one threshold for all adapted matrices and one for all others.

    Of each group exactly round(share x entries) go; of scores that are equal the first.

    Args:
        network: The network, its weights trained; a collective call where they are sharded.
        adapter_name: Name of its adapter.
        sparsity: Share of the adapted matrices' entries.
        others: Share of the other linear layers' entries.
        score: "WABS" or "ABS".
    """
    layers = [layer for layer in dsee_layers(network, adapter_name).values() if adapter_name in layer.dsee_mask]
    for adapted, share in ((True, sparsity), (False, others)):
        group = [layer for layer in layers if (adapter_name in layer.dsee_U) is adapted]
        k = round(share * sum(layer.in_features * layer.out_features for layer in group))
        if not k:
            continue

        def scores(group: list[DSEELayer] = group) -> Iterator[Tensor]:
            return (entry_scores(layer, adapter_name, score) for layer in group)

        threshold, ties = smallest(scores, k)
        for layer, own in zip(group, scores()):
            bits = _bits(own)
            kept = bits > threshold
            equal = (bits == threshold).nonzero().flatten()
            kept[equal[ties:]] = True
            ties = max(ties - len(equal), 0)
            mask = kept.view(layer.out_features, layer.in_features)
            layer.dsee_mask.put(adapter_name, packed(mask.t() if layer.stored_in_out else mask))


def sparsities(network: nn.Module, adapter_name: str) -> dict[str, float]:
    """Share of entries that S1 takes from the adapted matrices and from the others."""
    counts = {"adapted": [0, 0], "others": [0, 0]}
    for layer in dsee_layers(network, adapter_name).values():
        if adapter_name in layer.dsee_mask:
            kept = unpacked(layer.dsee_mask[adapter_name], torch.Size((layer.in_features * layer.out_features,)))
            count = counts["adapted" if adapter_name in layer.dsee_U else "others"]
            count[0] += int((~kept).sum())
            count[1] += kept.numel()
    return {group: gone / total for group, (gone, total) in counts.items() if total}


# -- heads ------------------------------------------------------------------------------------------------------------


def head_scores(network: nn.Module, part: Attention, adapter_name: str, score: str) -> Tensor:
    """Score of every key-value head of an attention with its queries, [groups]; both have to be adapted."""
    layers = dsee_layers(network, adapter_name)
    total = torch.zeros(part.groups)
    for name in (part.query, part.value):
        layer = layers[name]
        rows = update(layer, adapter_name).abs().sum(1)
        if score == "WABS":
            rows = rows + pretrained(layer).abs().sum(1)
        total += rows.view(part.groups, -1).sum(1).cpu()
    return total


@torch.no_grad()
def prune_heads(network: nn.Module, adapter_name: str, count: int, score: str = "WABS") -> None:
    """Lets the output projection of every attention read the heads of highest score alone.

    Args:
        network: The network, its weights trained; a collective call where they are sharded.
        adapter_name: Name of its adapter.
        count: How many heads of each attention go; with grouped queries, how many key-value heads, and their queries.
        score: "WABS" or "ABS".

    Raises:
        ValueError: That leaves no head, or queries and values are not adapted.
    """
    layers = dsee_layers(network, adapter_name)
    for part in check_heads(network, adapter_name, count):
        kept = torch.ones(part.groups, part.queries * part.width, dtype=torch.bool)
        kept[head_scores(network, part, adapter_name, score).argsort(stable=True)[:count]] = False
        layers[part.output].dsee_columns.put(adapter_name, kept.flatten())


def check_heads(network: nn.Module, adapter_name: str, count: int) -> list[Attention]:
    """The attentions, if `count` heads can be dropped from each.

    Raises:
        ValueError: It leaves no head, or queries and values are not adapted.
    """
    found, layers = attentions(base_of(network)), dsee_layers(network, adapter_name)
    for part in found:
        if not 0 < count < part.groups:
            raise ValueError(
                f"heads={count}: {part.module} has {part.groups} (key-value) heads, of which at least one has to stay "
                "and one to go."
            )
        bare = [name for name in (part.query, part.value) if not _is_adapted(layers, name, adapter_name)]
        if bare:
            raise ValueError(
                f"heads are scored by the updates of queries and values, and {bare[0]} has none: name both in "
                "target_modules."
            )
    return found


def _is_adapted(layers: dict[str, DSEELayer], name: str, adapter_name: str) -> bool:
    return name in layers and adapter_name in layers[name].dsee_U


@torch.no_grad()
def remove_heads(network: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Merges the adapters and cuts the dropped heads out: smaller matrices, the same answers.

    The network is plain afterwards. Its config says so where it can (one that has `head_dim`, as Llama's): then
    `save_pretrained` writes a folder that transformers loads. Others (BERT, ViT) compute the size of a head from the
    number of heads, so no config describes the smaller network: it works in this process, or as a pickled module.

    Args:
        network: A network with an adapter whose heads have been pruned, not sharded; changed in place.
        adapter_name: Name of the adapter.

    Returns:
        The network, without adapters.

    Raises:
        ValueError: No head has been dropped, the base is in 4 or 8 bits, or heads share a position bias (T5).
    """
    base, layers = base_of(network), dsee_layers(network, adapter_name)
    parts = attentions(base)
    masks = [layers[part.output].dsee_columns[adapter_name].clone() for part in parts if part.output in layers]
    if not masks or all(bool(mask.all()) for mask in masks):
        raise ValueError(f"no head has been dropped by the adapter {adapter_name!r}: there is nothing to cut out.")
    if any(layer.quantization_backend is not None for layer in layers.values()):
        raise ValueError("rows of a 4- or 8-bit weight cannot be cut out: load the network unquantised.")
    for part in parts:
        for name, child in base.get_submodule(part.module).named_modules():
            if isinstance(child, nn.Embedding):
                raise ValueError(
                    f"{part.module}.{name} has a bias for each head, which other blocks read as well, and every block "
                    "drops heads of its own: keep the heads masked (export without cutting them out)."
                )
    tuner_of(network).merge_and_unload()  # type: ignore[union-attr, operator]
    base.__dict__.pop("peft_tuner", None)
    adapters_of(base).clear()
    for part, columns in zip(parts, masks):
        kept = columns.view(part.groups, -1).any(1)  # [groups]
        groups = kept.nonzero().flatten().tolist()
        rows = kept.repeat_interleave(part.width)
        for name, index, dimension in (
            (part.query, columns, 0),
            (part.key, rows, 0),
            (part.value, rows, 0),
            (part.output, columns, 1),
        ):
            parent, _, own = name.rpartition(".")
            setattr(base.get_submodule(parent), own, _cut(base.get_submodule(name), index, dimension))
        heads = len(groups) * part.queries
        sizes = {
            "num_heads": heads,
            "num_attention_heads": heads,
            "num_key_value_heads": len(groups),
            "all_head_size": heads * part.width,
        }
        attention = unwrapped(base.get_submodule(part.module))
        for name, size in sizes.items():
            if hasattr(attention, name):
                setattr(attention, name, size)
    config = getattr(base, "config", None)
    if config is not None and hasattr(config, "head_dim"):
        config.head_dim, config.num_attention_heads = parts[0].width, heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = len(groups)
    return base


def _cut(layer: nn.Module, kept: Tensor, dimension: int) -> nn.Module:
    """A linear layer of the kept outputs (0) or inputs (1) alone."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    weight = weight[kept] if dimension == 0 else weight[:, kept]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)  # type: ignore[arg-type]
    if bias is not None:
        made.bias = nn.Parameter(bias[kept] if dimension == 0 else bias, requires_grad=bias.requires_grad)
    return made.train(layer.training)
