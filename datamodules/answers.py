"""Answers that a network generates to prompts, kept in Parquet shards: a run that was killed goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def network_fingerprint(network: nn.Module) -> str:
    """A hash of every parameter's and buffer's name, shape and (a sample of) values, and of the config.

    At most 1,024 evenly spaced values a tensor: a training step changes nearly all of them.
    """
    made = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // 1024)].cpu()
        values = values.double() if values.is_floating_point() else values.long()
        made.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        made.update(values.numpy().tobytes())
    return made.hexdigest()[:32]


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]], chat_template: str | None = None) -> list[int]:
    """What generation starts from: the text, or the turns with the template's generation prompt behind."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        # A tokenizer that puts an end behind every text would have the network start anew.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, chat_template=chat_template
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def generate_answers(
    network: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, generation: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """One answer to each prompt, in their order; the global random state is left as it was.

    Args:
        network: A transformers network with `generate`, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        batch_size: Prompts at once, padded on the left.
        generation: Arguments of `generate`, such as `max_new_tokens`, `do_sample`, `temperature`.
        seed: Seed of the sampling.

    Returns:
        For each prompt `answer`, the text up to the end-of-turn token, and `finished`, whether there was one.
    """
    device = next(network.parameters()).device
    own = getattr(network.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    options = {"pad_token_id": pad, "eos_token_id": sorted(ends) or None, **generation}
    answers = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            time = max(map(len, batch))
            ids = torch.tensor([[pad] * (time - len(one)) + one for one in batch], device=device)
            mask = torch.tensor([[0] * (time - len(one)) + [1] * len(one) for one in batch], device=device)
            for made in network.generate(input_ids=ids, attention_mask=mask, **options)[:, time:].tolist():
                length = next((i for i, token in enumerate(made) if token in ends), None)
                text = tokenizer.decode(made[:length], skip_special_tokens=True)
                answers.append({"answer": text, "finished": length is not None})
    return answers


def cached_answers(
    folder: Path,
    prompts: list[list[int]],
    answer: Callable[[list[list[int]], int], list[dict[str, Any]]],
    settings: dict[str, Any],
    shard_size: int = 64,
    rank: int = 0,
    ranks: int = 1,
    barrier: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """The answers to all prompts, each shard made once, by one rank, in any number of runs.

    A shard holds `shard_size` consecutive prompts, is seeded by its number and renamed into place when it is whole, so
    that neither a kill nor the number of ranks changes a word.

    Args:
        folder: Where all caches stand; this one's name in it is a hash of `prompts` and `settings`.
        prompts: Token ids of each prompt.
        answer: From a shard's prompts and its number to its answers.
        settings: Whatever else the answers depend on, JSON; written beside the shards as `settings.json`.
        shard_size: Prompts in a shard.
        rank: This process.
        ranks: All processes; `folder` must be one for all.
        barrier: Waits for all processes.

    Returns:
        An answer to each prompt, as `answer` gave it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = {**settings, "shard_size": shard_size, "prompts": _digest(prompts)}
    folder = folder / _digest(settings)
    folder.mkdir(parents=True, exist_ok=True)
    _renamed_into(folder / "settings.json", lambda path: path.write_text(json.dumps(settings, indent=2)))
    shards = range(-(-len(prompts) // shard_size))
    paths = [folder / f"shard-{number:05d}.parquet" for number in shards]
    for number in shards[rank::ranks]:
        if not paths[number].is_file():
            made = answer(prompts[number * shard_size : (number + 1) * shard_size], number)
            _renamed_into(paths[number], partial(pq.write_table, pa.Table.from_pylist(made)))
    if barrier is not None:
        barrier()
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _renamed_into(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, path)


@contextmanager
def evaluating(network: Any, device: torch.device) -> Iterator[None]:
    """The network in evaluation mode on `device`, without its adapters where it has any; afterwards all as before."""
    training = {module: module.training for module in network.modules()}
    before = next(network.parameters()).device
    network.eval()
    if before != device:
        network.to(device)
    try:
        if hasattr(network, "disable_adapter"):
            with network.disable_adapter():
                yield
        else:
            yield
    finally:
        if before != device:
            network.to(before)
        for module, mode in training.items():
            module.training = mode
