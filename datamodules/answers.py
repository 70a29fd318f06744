"""Answers that a network generates to prompts, kept in Parquet shards: a run that was killed goes on where it stood."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_peft.models.generation import left_padded
from lightning_peft.network_modes import adapters_disabled, evaluation_mode


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]], chat_template: str | None = None) -> list[int]:
    """What generation starts from: the text, or the turns with the template's generation prompt behind."""
    return _continued_ids(tokenizer, prompt, "", chat_template)


def choice_ids(
    tokenizer: Any, prompt: str | list[dict[str, Any]], choices: list[str], chat_template: str | None = None
) -> tuple[list[int], list[list[int]]]:
    """Tokens that all choices begin with, the prompt among them, and the rest of each, cut as the whole text is.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: What is given, a text or turns.
        choices: How it may go on, at least two; nothing is put between.
        chat_template: In place of the tokenizer's own.

    Raises:
        ValueError: The tokens of one choice are those of another, or their beginning.
    """
    whole = [_continued_ids(tokenizer, prompt, choice, chat_template) for choice in choices]
    for one, other in itertools.permutations(range(len(whole)), 2):
        if whole[other][: len(whole[one])] == whole[one]:
            raise ValueError(
                f"the tokenizer writes {choices[one]!r} as the beginning of {choices[other]!r}, or as the same: the "
                "network cannot be asked to choose between them. Give choices that it writes apart."
            )
    shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*whole)))
    return whole[0][:shared], [ids[shared:] for ids in whole]


def _continued_ids(
    tokenizer: Any, prompt: str | list[dict[str, Any]], continuation: str, chat_template: str | None
) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt + continuation)["input_ids"])
        # A tokenizer that puts an end behind every text would have the network start anew.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, chat_template=chat_template
    )
    return list(tokenizer(text + continuation, add_special_tokens=False)["input_ids"])


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
    ends, options = generation_options(network, tokenizer, generation)
    answers = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, len(prompts), batch_size):
            ids, mask = left_padded(prompts[begin : begin + batch_size], options["pad_token_id"], device)
            for made in network.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist():
                length = next((i for i, token in enumerate(made) if token in ends), None)
                text = tokenizer.decode(made[:length], skip_special_tokens=True)
                answers.append({"answer": text, "finished": length is not None})
    return answers


@torch.no_grad()
def score_choices(
    network: Any, prompts: list[list[int]], choices: list[list[list[int]]], batch_size: int
) -> list[list[float]]:
    """log p(choice | prompt) of every choice, the sum over its tokens.

    Args:
        network: A causal language model of transformers, in evaluation mode.
        prompts: Token ids of each prompt, at least one.
        choices: Token ids of each prompt's choices.
        batch_size: Choices at once, padded on the left.

    Returns:
        For each prompt the log probabilities of its choices.
    """
    device = next(network.parameters()).device
    rows = [(prompt + choice, len(choice)) for prompt, own in zip(prompts, choices) for choice in own]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = [0.0] * len(rows)
    for begin in range(0, len(rows), batch_size):
        batch = [rows[i] for i in order[begin : begin + batch_size]]
        longest = max(n for _, n in batch)
        ids, mask = left_padded([ids for ids, _ in batch], 0, device)
        logits = network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, -longest:].flatten(), reduction="none"
        ).view(len(batch), longest)
        own = torch.arange(longest, device=device) >= longest - torch.tensor([[n] for _, n in batch], device=device)
        for i, score in zip(order[begin : begin + batch_size], (-nll * own).sum(1).tolist()):
            scores[i] = score
    made = iter(scores)
    return [[next(made) for _ in own] for own in choices]


def generation_options(network: Any, tokenizer: Any, generation: dict[str, Any]) -> tuple[set[int], dict[str, Any]]:
    """The tokens that end an answer, and all arguments of `generate`.

    Args:
        network: A transformers network with `generate`.
        tokenizer: Its tokenizer.
        generation: Arguments that win over the defaults.
    """
    own = getattr(network.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return ends, {"pad_token_id": pad, "eos_token_id": sorted(ends) or None, **generation}


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
    before = next(network.parameters()).device
    if before != device:
        network.to(device)
    try:
        with evaluation_mode(network), adapters_disabled(network):
            yield
    finally:
        if before != device:
            network.to(before)
