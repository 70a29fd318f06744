"""Knowledge-vector attribution: what each output neuron of the feed-forward parts does for general answers (LoKI, KVA).

Paper 21, arXiv 2505.22120; code Nexround/LoKI, `base_kva_model.py` and `layer_balanced.py`. A node is a row of W_down,
which makes entry j of the output o of a layer's feed-forward part. For a question, F is the probability of the token
that the network predicts behind it, and by integrated gradients from a baseline b

    attr_j = (o_j - b_j) * mean over alpha of dF / d(b + alpha (o - b))_j        (the code; eq. 4 leaves the factor out)

read at the question's last token, while the outputs of that layer are scaled at all positions. The mean is a trapezoid
sum over `steps` values of alpha. The authors' differs by a factor (m - 1) / m, captum's, which leaves the order alone;
and with batches padded on the right they read a pad where a question is shorter: here each one's last real token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network_modes import evaluation_mode
from lightning_peft.network_record import network_fingerprint
from lightning_peft.roles import Weight, inner_model, transformer_blocks, weights_by_role

METHOD = "knowledge-vectors"
BASELINES = ("zero", "token0")


def down_weights(weights: Sequence[Weight]) -> list[Weight]:
    """The feed-forward parts' down matrices, one a block, in the blocks' order.

    Raises:
        ValueError: There are none, or experts stand in their place.
    """
    found = [w for w in weights if w.role == "ffn.down" and not w.is_bias]
    if not found:
        experts = any(w.role.startswith("expert") for w in weights)
        raise ValueError(
            "this network has no feed-forward down projection that is known"
            + (": its feed-forward parts are experts, for which use ExpertSpecialized." if experts else ".")
        )
    return found


def attributions(
    network: nn.Module,
    questions: Sequence[Sequence[int]],
    steps: int = 7,
    baseline: str = "zero",
    every_position: bool = False,
) -> dict[str, Tensor]:
    """Attribution of every node for some questions, a pass for each layer and all its steps at once.

    The blocks before the layer in question are not run again: their last output is handed on.

    Args:
        network: A causal language model.
        questions: Token ids of each.
        steps: m, values of alpha from 0 to 1.
        baseline: "zero", or "token0": the layer's output for token 0 throughout (the authors' code).
        every_position: Also give the attribution of all other positions, [questions, time, hidden], 0 at pads.

    Returns:
        By the down matrix's name, [questions, hidden].

    Raises:
        ValueError: `steps` is below 2, `baseline` is unknown, or there is no question.
    """
    if steps < 2 or baseline not in BASELINES:
        raise ValueError(f"steps={steps}, baseline={baseline!r}: at least 2 steps, and one of {BASELINES}.")
    if not questions or not all(questions):
        raise ValueError("there is no question, or one of them has no token.")
    downs = down_weights(weights_by_role(network))
    inner = inner_model(network)
    ids, mask, last = _padded(questions, next(network.parameters()).device)
    n, rows = len(questions), torch.arange(len(questions), device=ids.device)
    alpha = torch.linspace(0, 1, steps, device=ids.device)
    share = torch.full_like(alpha, 1 / (steps - 1))
    share[[0, -1]] /= 2  # trapezoid
    found: dict[str, Tensor] = {}
    with evaluation_mode(network), _frozen(network):
        with torch.no_grad(), _outputs(network, downs) as (outputs, blocks):
            logits = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
        token = logits[rows, last].argmax(-1)
        origins: dict[str, Tensor] = {}
        if baseline == "token0":
            with torch.no_grad(), _outputs(network, downs) as (origins, _):
                inner(input_ids=torch.zeros_like(ids), attention_mask=mask, use_cache=False)
        many = {"input_ids": ids.repeat(steps, 1), "attention_mask": mask.repeat(steps, 1), "use_cache": False}
        for down in downs:
            o = outputs[down.name]
            b = origins[down.name] if origins else torch.zeros_like(o)
            # [steps, questions, time, hidden], the steps along the batch
            scaled = (b + alpha[:, None, None, None].to(o.dtype) * (o - b)).flatten(0, 1).requires_grad_()
            with _from_block(network, down, blocks, steps), _replaced(network, down, scaled), torch.enable_grad():
                logits = inner(**many).logits
                at = logits[torch.arange(steps * n, device=ids.device), last.repeat(steps)]
                f = at.float().softmax(-1).gather(1, token.repeat(steps)[:, None]).sum()
            (slope,) = torch.autograd.grad(f, scaled)
            slope = slope.unflatten(0, (steps, n)).float()
            if not every_position:
                slope, o, b = slope[:, rows, last], o[rows, last], b[rows, last]
            mean = (share.view(-1, *[1] * (slope.ndim - 1)) * slope).sum(0)
            made = (o - b).float() * mean
            found[down.name] = made * mask[..., None] if every_position else made
    return found


def lowest_nodes(scores: Sequence[Tensor], quota: float) -> list[Tensor]:
    """The layer-balanced selection: in each layer, the nodes that are most often among the lowest.

    k = floor(quota / 100 * hidden). For each question and layer the k nodes of lowest attribution (signed, as in the
    authors' code) are taken; of each layer the k most often taken are kept. Of equals the one with the lower sum of
    attributions, then the earlier, comes first.

    Args:
        scores: Of each layer, [questions, hidden].
        quota: Share of the nodes, in percent.

    Returns:
        Of each layer, k numbers in ascending order.

    Raises:
        ValueError: The quota lies outside of (0, 100], or leaves no node of a layer.
    """
    if not 0 < quota <= 100:
        raise ValueError(f"quota={quota} must be a percentage in (0, 100].")
    chosen = []
    for layer in scores:
        hidden = layer.shape[1]
        k = int(quota * hidden / 100 + 1e-9)
        if k == 0:
            raise ValueError(
                f"quota={quota} percent of {hidden} nodes is less than one: use {100 / hidden:.3g} or more."
            )
        taken = torch.zeros(hidden, dtype=torch.long)
        lowest = layer.float().cpu().argsort(dim=1, stable=True)[:, :k]
        taken.index_add_(0, lowest.flatten(), torch.ones(lowest.numel(), dtype=torch.long))
        order = sorted(range(hidden), key=lambda j: (-int(taken[j]), float(layer[:, j].sum()), j))
        chosen.append(torch.tensor(sorted(order[:k])))
    return chosen


def question_scores(
    network: nn.Module,
    questions: Sequence[Sequence[int]],
    steps: int = 7,
    baseline: str = "zero",
    batch_size: int = 4,
    folder: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Tensor]:
    """`attributions` of many questions, in shards that a later call, or another process, goes on from.

    Args:
        network: As there.
        questions: Token ids of each.
        steps: As there.
        baseline: As there.
        batch_size: Questions at once; a pass holds `steps` times as many rows.
        folder: Where shards are kept; without one nothing is kept, and one process makes all.
        rank: This process makes every `world_size`-th shard from here on.
        world_size: How many processes share the work. Call again, with 0 and 1, when all have done theirs.
        progress: Called with the number of questions done.

    Returns:
        By the down matrix's name, [questions, hidden]; of other ranks' shards that are missing nothing, if `rank` or
        `world_size` say that there are others.
    """
    from safetensors.torch import load_file, save_file

    settings = json.dumps([network_fingerprint(network), steps, baseline, batch_size, [list(q) for q in questions]])
    key = hashlib.sha256(settings.encode()).hexdigest()[:24]
    parts = []
    for number, start in enumerate(range(0, len(questions), batch_size)):
        if number % world_size != rank:
            continue
        shard = None if folder is None else Path(folder) / key / f"{number:06d}.safetensors"
        if shard is not None and shard.is_file():
            parts.append(load_file(shard))
        else:
            made = attributions(network, questions[start : start + batch_size], steps, baseline)
            parts.append({name: value.cpu().contiguous() for name, value in made.items()})
            if shard is not None:
                shard.parent.mkdir(parents=True, exist_ok=True)
                unfinished = shard.with_suffix(f".{rank}.unfinished")
                save_file(parts[-1], unfinished)
                unfinished.replace(shard)
        if progress is not None:
            progress(min(start + batch_size, len(questions)))
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


# -- passes -----------------------------------------------------------------------------------------------------------


def _padded(questions: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [questions, time], padded on the right, and each one's last real position."""
    lengths = torch.tensor([len(q) for q in questions], device=device)
    ids = torch.zeros(len(questions), int(lengths.max()), dtype=torch.long, device=device)
    for row, question in enumerate(questions):
        ids[row, : len(question)] = torch.tensor(list(question), device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    return ids, mask, lengths - 1


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient: the graph is that of activations alone."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _module_of(network: nn.Module, weight: Weight) -> nn.Module:
    return network.get_submodule(weight.name.rpartition(".")[0])


@contextmanager
def _outputs(network: nn.Module, downs: Sequence[Weight]) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Outputs of the down projections by weight, and of whole blocks by block, as a forward makes them."""
    found: dict[str, Tensor] = {}
    blocks: dict[str, Any] = {}
    handles = []
    for down in downs:

        def keep(_: Any, __: Any, out: Tensor, name: str = down.name) -> None:
            found[name] = out.detach()

        def keep_block(_: Any, __: Any, out: Any, name: str = str(down.block)) -> None:
            blocks[name] = out

        handles.append(_module_of(network, down).register_forward_hook(keep))
        handles.append(network.get_submodule(str(down.block)).register_forward_hook(keep_block))
    try:
        yield found, blocks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(network: nn.Module, down: Weight, value: Tensor) -> Iterator[None]:
    """A down projection that gives `value` instead of its output."""
    handle = _module_of(network, down).register_forward_hook(lambda *_: value)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _from_block(network: nn.Module, down: Weight, blocks: dict[str, Any], copies: int) -> Iterator[None]:
    """A forward that starts at a layer: the block before gives what it gave, `copies` times, and no other one runs."""
    before = [name for name, _ in transformer_blocks(network)]
    before = before[: before.index(str(down.block))]
    modules = [network.get_submodule(name) for name in before]
    kept = [module.__dict__.get("forward") for module in modules]
    for number, (name, module) in enumerate(zip(before, modules)):
        known = _repeated(blocks[name], copies)
        if number < len(modules) - 1:
            module.forward = lambda hidden, *_, _like=blocks[name], **__: _shaped(hidden, _like)  # type: ignore[method-assign]
        else:
            module.forward = lambda *_, _known=known, **__: _known  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, kept):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _repeated(output: Any, copies: int) -> Any:
    if isinstance(output, Tensor):
        return output.detach().repeat(copies, 1, 1)
    return (output[0].detach().repeat(copies, 1, 1), *output[1:])


def _shaped(hidden: Tensor, like: Any) -> Any:
    """What is handed on unread, as a block returns it."""
    return hidden if isinstance(like, Tensor) else (hidden, *like[1:])
