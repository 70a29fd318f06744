"""Directions of concepts in the residual stream: how they are found, shown to a reader, chosen and kept.

For `callbacks.ConceptAblation` (paper 18, arXiv 2507.16795; its code is cadentj/caft). A set of directions is a
dictionary from a block's position to a matrix [k, width], a direction a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network_modes import adapters_disabled, evaluation_mode
from lightning_peft.sublayers import Sublayer, sublayers

Directions = Mapping[int, Tensor]
IGNORED = -100


# -- finding ----------------------------------------------------------------------------------------------------------


def activation_difference_pca(
    tuned: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    layers: Sequence[int],
    components: int = 20,
    base: nn.Module | None = None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Principal components of what fine-tuning changed: blocks' outputs, fine-tuned minus base, on learnt tokens.

    The batches should be generic text, not that of the fine-tuning. Exact, from a covariance [width, width] that is
    summed up batch by batch in fp64; the authors hold all activations and take torch's randomised `svd_lowrank`.

    Args:
        tuned: The naively fine-tuned network.
        batches: With `input_ids`, `attention_mask` and `labels` [batch, time]; tokens whose label is -100 do not count
            (without `labels`, those outside of the mask).
        layers: Positions of the blocks.
        components: How many components of each.
        base: The network before; by default `tuned` with its adapters switched off.

    Returns:
        Directions [components, width], unit vectors in order, and the share of the variance that each explains.

    Raises:
        ValueError: A layer is not there, no token counts, or there are fewer dimensions than `components`.
    """
    names = {layer: part.block for layer, part in blocks_by_position(tuned, layers).items()}
    base_names = names if base is None else {n: p.block for n, p in blocks_by_position(base, layers).items()}
    sums: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    count = 0
    for batch in batches:
        kept = counted(batch)
        count += int(kept.sum())
        after = _outputs(tuned, names, batch)
        with nullcontext() if base is not None else adapters_disabled(tuned):
            before = _outputs(tuned if base is None else base, base_names, batch)
        for layer in layers:
            change = (after[layer].float() - before[layer].float())[kept].double()
            sums[layer] = sums.get(layer, 0) + change.sum(0)
            products[layer] = products.get(layer, 0) + change.T @ change
    if not count:
        raise ValueError("no token of the batches counts: every label is -100, or there is no batch.")
    directions, shares = {}, {}
    for layer in layers:
        width = len(sums[layer])
        if not 0 < components <= width:
            raise ValueError(f"components={components} must lie between 1 and the width of the network, {width}.")
        mean = sums[layer] / count
        variances, vectors = torch.linalg.eigh(products[layer] / count - torch.outer(mean, mean))
        directions[layer] = vectors.flip(1)[:, :components].T.float().contiguous()
        shares[layer] = (variances.flip(0)[:components] / variances.sum().clamp(min=1e-30)).float()
    return directions, shares


def sae_decoder_directions(decoder: Tensor, latents: Sequence[int]) -> Tensor:
    """What a sparse autoencoder's latents write: rows of its decoder.

    Args:
        decoder: W_dec [latents, width].
        latents: Their numbers.

    Raises:
        ValueError: A number is not among the decoder's latents.
    """
    wrong = [latent for latent in latents if not 0 <= latent < len(decoder)]
    if wrong:
        raise ValueError(f"latents {wrong} are not there: the decoder has {len(decoder)}, from 0 on.")
    return decoder[list(latents)].detach().float()


def attribution_rank(
    network: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    layer: int,
    encode: Callable[[Tensor], Tensor],
    decoder: Tensor,
) -> Tensor:
    """First-order effect on the loss of taking each latent out, for ranking: mean over tokens of -a_j (g . W_dec,j).

    With a = encode(h) of a block's output h and g = d loss / d h. Positive means that the loss would fall without it.

    Args:
        network: Returns a `loss` for a batch with `labels`.
        batches: As for `activation_difference_pca`.
        layer: The block's position.
        encode: From activations [..., width] to latents [..., latents].
        decoder: W_dec [latents, width].

    Returns:
        Scores [latents].

    Raises:
        ValueError: The layer is not there, or no token counts.
    """
    name = blocks_by_position(network, [layer])[layer].block
    scores, count = torch.zeros(len(decoder), dtype=torch.float64), 0
    for batch in batches:
        kept = counted(batch)
        seen: dict[str, Tensor] = {}

        def keep(_: Any, __: Any, output: Any, seen: dict[str, Tensor] = seen) -> Any:
            # The network's own output, as a leaf of what follows: frozen or not, it gets a gradient.
            seen["h"] = hidden_of(output).detach().requires_grad_()
            return with_hidden(output, seen["h"])

        handle = network.get_submodule(name).register_forward_hook(keep)
        try:
            with evaluation_mode(network), torch.enable_grad():
                loss = network(**batch).loss
        finally:
            handle.remove()
        (g,) = torch.autograd.grad(loss, seen["h"])
        with torch.no_grad():
            latents = encode(seen["h"][kept].float())
            scores -= (latents * (g[kept].float() @ decoder.T.float())).double().sum(0).cpu()
        count += int(kept.sum())
    if not count:
        raise ValueError("no token of the batches counts: every label is -100, or there is no batch.")
    return (scores / count).float()


# -- showing and choosing ---------------------------------------------------------------------------------------------


def write_report(
    path: str | Path,
    directions: Directions,
    network: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    tokenizer: Any,
    examples: int = 5,
    context: int = 12,
    shares: Mapping[int, Tensor] | None = None,
) -> Path:
    """Writes which texts lie farthest along and against each direction, for a reader who chooses among them.

    The file is JSON, a list of entries with `layer`, `direction`, `explains`, `top`, `bottom` and `ablate`: set the
    last to true where the texts show the concept to be ablated, and hand the file to `chosen_directions` or to
    `ConceptAblation(report=...)`. A picture of all projections' spread is written beside it.

    Args:
        path: Where the report goes, ending in `.json`.
        directions: What was found.
        network: The network that they were found in.
        batches: Texts to show, with `input_ids`, `attention_mask` and perhaps `labels` [batch, time].
        tokenizer: Decodes the examples.
        examples: Texts at each end of a direction.
        context: Tokens shown before the one that projects farthest, which stands in [[ ]].
        shares: Explained variance by layer, if known.
    """
    names = {layer: part.block for layer, part in blocks_by_position(network, list(directions)).items()}
    ends: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for batch in batches:
        kept, found = counted(batch), _outputs(network, names, batch)
        for layer, rows in directions.items():
            projected = found[layer].float() @ rows.T.to(found[layer].device).float()  # [batch, time, k]
            for number in range(len(rows)):
                values = projected[..., number]
                for sign in (1, -1):
                    best = (sign * values).masked_fill(~kept, -torch.inf).max(1)
                    for row, (value, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
                        if value > -float("inf"):
                            shown = _shown(batch["input_ids"][row], place, context, tokenizer)
                            ends.setdefault((layer, number), []).append((sign * value, shown))
    entries = []
    for (layer, number), seen in sorted(ends.items()):
        ordered = sorted(dict.fromkeys(seen), key=lambda one: -one[0])
        share = None if shares is None else float(shares[layer][number])
        entry = {"layer": layer, "direction": number, "explains": share, "ablate": False}
        top, bottom = ordered[:examples], ordered[::-1][:examples]
        entries.append({**entry, "top": [[v, t] for v, t in top], "bottom": [[v, t] for v, t in bottom]})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False))
    _draw(path.with_suffix(".png"), ends)
    return path


def chosen_directions(directions: Directions, report: str | Path) -> dict[int, Tensor]:
    """The directions that a report marks with `ablate`.

    Raises:
        ValueError: None is marked, or one that is marked is not among the directions.
    """
    marked = [
        (int(one["layer"]), int(one["direction"])) for one in json.loads(Path(report).read_text()) if one["ablate"]
    ]
    if not marked:
        raise ValueError(f"{report} marks no direction: set 'ablate' to true in the entries that are to be ablated.")
    for layer, number in marked:
        if layer not in directions or not 0 <= number < len(directions[layer]):
            raise ValueError(f"{report} marks direction {number} of layer {layer}, which the directions do not have.")
    return {
        layer: directions[layer][[number for other, number in marked if other == layer]]
        for layer in dict.fromkeys(layer for layer, _ in marked)
    }


def _shown(ids: Tensor, place: int, context: int, tokenizer: Any) -> str:
    before, token = ids[max(0, place - context) : place], ids[place : place + 1]
    return f"{tokenizer.decode(before)}[[{tokenizer.decode(token)}]]"


def _draw(path: Path, ends: Mapping[tuple[int, int], list[tuple[float, str]]]) -> None:
    from lightning_peft.pictures import new_figure

    figure, axes = new_figure(1.5 + 0.35 * len(ends), 4)
    axes.boxplot([[value for value, _ in ends[key]] for key in sorted(ends)], showfliers=True)
    axes.set_xticks(range(1, len(ends) + 1), [f"{layer}/{number}" for layer, number in sorted(ends)], rotation=90)
    axes.set(xlabel="layer / direction", ylabel="farthest projections, a text each")
    figure.savefig(path, dpi=120)


# -- keeping ----------------------------------------------------------------------------------------------------------


def save_directions(path: str | Path, directions: Directions, provenance: Mapping[str, Any] | None = None) -> Path:
    """Writes directions as safetensors, with where they come from (JSON values) in the file's metadata."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer_{layer}": rows.detach().float().cpu().clone() for layer, rows in directions.items()}
    save_file(tensors, path, {"provenance": json.dumps(dict(provenance or {}))})
    return path


def load_directions(path: str | Path) -> dict[int, Tensor]:
    """Reads what `save_directions` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"directions={str(path)!r}: there is no such file; lightning_peft.concepts makes one.")
    tensors = load_file(path)
    if not tensors or not all(name.startswith("layer_") and value.ndim == 2 for name, value in tensors.items()):
        raise ValueError(f"{path} holds {sorted(tensors)[:3]}: directions are matrices [k, width] named layer_N.")
    return {int(name.removeprefix("layer_")): value for name, value in sorted(tensors.items())}


# -- blocks and their outputs -----------------------------------------------------------------------------------------


def blocks_by_position(network: nn.Module, layers: Sequence[int]) -> dict[int, Sublayer]:
    """A part of each block that is asked for, by the position given (negative ones count from the end).

    Of an encoder-decoder the decoder's blocks count.

    Raises:
        ValueError: There is no such block, or the network has none.
    """
    parts = sublayers(network)
    stacks = {part.stack for part in parts}
    if stacks >= {"encoder", "decoder"}:
        parts = [part for part in parts if part.stack == "decoder"]
    by_index = {part.index: part for part in parts}
    for layer in layers:
        if not -len(by_index) <= layer < len(by_index):
            raise ValueError(
                f"layer {layer} is not there: {type(network).__name__} has {len(by_index)} blocks, 0 to "
                f"{len(by_index) - 1} (or negative, from the end)."
            )
    return {layer: by_index[layer % len(by_index)] for layer in layers}


def hidden_of(output: Any) -> Tensor:
    """The residual stream [batch, time, width] in what a block returned: a tensor, or a tuple with it in front."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with another residual stream."""
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens count [batch, time]: those with a label, else those of the mask, else all."""
    if "labels" in batch:
        return batch["labels"] != IGNORED
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def _kept_outputs(network: nn.Module, names: Mapping[int, str]) -> Iterator[dict[int, Tensor]]:
    outputs: dict[int, Tensor] = {}
    handles = []
    for layer, name in names.items():

        def keep(_: Any, __: Any, output: Any, layer: int = layer) -> None:
            outputs[layer] = hidden_of(output).detach()

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _outputs(network: nn.Module, names: Mapping[int, str], batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Blocks' outputs [batch, time, width] of a batch, in evaluation mode."""
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    with evaluation_mode(network), _kept_outputs(network, names) as outputs:
        network(**inputs)
    return outputs
