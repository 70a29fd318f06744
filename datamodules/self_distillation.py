"""Self-distilled data (paper 1): the network's own answers in place of the data's, for what must not shift it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.answers import (
    cached_answers,
    evaluating,
    generate_answers,
    network_fingerprint,
    prompt_ids,
)
from lightning_peft.datamodules.chat_template import as_messages
from lightning_peft.datamodules.instruction_data import InstructionData

UNFINISHED = ("drop", "keep")


class SelfDistillationData(InstructionData):
    """Prompts with the answers that the network in training gives itself, before it is trained.

    Concept-aware fine-tuning pre-trains its auxiliary heads on such data, so that they learn the network as it is
    (arXiv 2506.07833, section on head pre-training). Answers are generated once, in `setup`, by all ranks, and kept in
    Parquet shards keyed by the network's weights, the prompts and the settings; a killed run goes on where it stood.
    Then they are ordinary rows: the prompt masked, the answer and its end-of-turn token learnt.

    Args:
        data: As for `InstructionData`; of a conversation what stands before the last assistant's turn is the prompt.
        generation: Arguments of `generate`; by default greedy, with at most 256 new tokens. Sampling such as
            `{"do_sample": true, "temperature": 0.7}` is seeded by `seed`.
        generation_batch_size: Prompts at once.
        unfinished: Answers without an end-of-turn token, cut at `max_new_tokens`: "drop" them, or "keep" them (and
            learn to stop there).
        cache_dir: Where answers are kept, the same for all ranks; by default `$LIGHTNING_PEFT_CACHE`, else
            `~/.cache/lightning_peft`.
        shard_size: Prompts in a shard.
        model: Another network to answer, by name, path or GGUF file; by default the one in training.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: No network that generates, prompts that leave no room for an answer, or no answer that is finished.
    """

    def __init__(
        self,
        data: str | list[dict[str, Any]] | dict[str, Any] | Any,
        generation: dict[str, Any] | None = None,
        generation_batch_size: int = 8,
        unfinished: str = "drop",
        cache_dir: str | None = None,
        shard_size: int = 64,
        model: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, **kwargs)
        if unfinished not in UNFINISHED:
            raise ValueError(f"unfinished={unfinished!r} is not known: use 'drop' or 'keep'.")
        if self.streaming:
            raise ValueError("streaming=True: answers are generated for a data set at hand; give a part of the stream.")
        self.generation = {"max_new_tokens": 256, "do_sample": False, **(generation or {})}
        self.generation_batch_size, self.shard_size, self.unfinished = generation_batch_size, shard_size, unfinished
        cache = cache_dir or os.environ.get("LIGHTNING_PEFT_CACHE") or Path.home() / ".cache" / "lightning_peft"
        self.cache_dir = Path(cache).expanduser() / "self_distillation"
        self.model = model
        self.row_options |= {"completion_only_loss": True, "assistant_only_loss": True}
        self._fingerprint: str | None = None

    def prepare_data(self) -> None:
        # Generating takes all ranks: it waits for `setup`. Here only what is downloaded is.
        self._raw = self.read()

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        carried_columns: Any = self.row_options["keep_columns"]
        template: Any = self.row_options["chat_template"]
        carried = [name for name in ["weight", *carried_columns] if name in rows.column_names]
        asked = [_prompt(row) for row in rows]
        ids = [prompt_ids(self.tokenizer, prompt, template) for prompt in asked]
        long = [i for i, one in enumerate(ids) if len(one) >= self.max_length]
        if long and self.overlong != "drop":
            raise ValueError(
                f"{len(long)} of {len(ids)} {split} prompts (rows {', '.join(map(str, long[:5]))}) fill max_length="
                f"{self.max_length}: there is no room for an answer. Raise max_length, or set overlong='drop'."
            )
        kept = [i for i in range(len(ids)) if len(ids[i]) < self.max_length]
        answers = self._answers([ids[i] for i in kept])
        done = [(i, one["answer"]) for i, one in zip(kept, answers) if one["finished"] or self.unfinished == "keep"]
        rank_zero_info(f"{split} data: {len(done)} of {len(ids)} prompts have an answer that is learnt from.")
        if not done:
            raise ValueError(
                f"none of {len(ids)} {split} prompts has a finished answer of at most max_new_tokens="
                f"{self.generation.get('max_new_tokens')}: raise it in generation=, or set unfinished='keep'."
            )
        made = [
            {
                "prompt": asked[i],
                "completion": text if isinstance(asked[i], str) else [{"role": "assistant", "content": text}],
                **{name: rows[i][name] for name in carried},
            }
            for i, text in done
        ]
        return datasets.Dataset.from_list(made)

    def _answers(self, ids: list[list[int]]) -> list[dict[str, Any]]:
        network = self._network()
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer is not None else next(network.parameters()).device
        with evaluating(network, device):
            self._fingerprint = self._fingerprint or network_fingerprint(network)

            def answer(prompts: list[list[int]], number: int) -> list[dict[str, Any]]:
                rank_zero_info(
                    f"generating answers {number * self.shard_size} to {number * self.shard_size + len(prompts)}"
                )
                return generate_answers(
                    network, self.tokenizer, prompts, self.generation_batch_size, self.generation, self.seed + number
                )

            return cached_answers(
                self.cache_dir,
                ids,
                answer,
                {
                    "network": self._fingerprint,
                    "generation": self.generation,
                    "generation_batch_size": self.generation_batch_size,
                    "seed": self.seed,
                },
                self.shard_size,
                trainer.global_rank if trainer is not None else 0,
                trainer.world_size if trainer is not None else 1,
                trainer.strategy.barrier if trainer is not None else None,
            )

    def _network(self) -> Any:
        if isinstance(self.model, str):
            from lightning_peft.models.pretrained import load_pretrained

            self.model = load_pretrained("AutoModelForCausalLM", self.model)
        network = self.model
        if network is None and self.trainer is not None:
            network = getattr(self.trainer.lightning_module, "model", None)
        if not isinstance(network, torch.nn.Module) or not hasattr(network, "generate"):
            raise ValueError(
                "SelfDistillationData has no network to answer: train a CausalLM with it, or give model= by name."
            )
        return network


def _prompt(row: dict[str, Any]) -> str | list[dict[str, Any]]:
    """What a row asks: its prompt, or the turns before the last assistant's."""
    turns = row.get("messages", row.get("conversations"))
    if turns is not None:
        turns = as_messages(turns)
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        if not turns[:last]:
            raise ValueError("a conversation has no turn before the assistant's: there is nothing to answer.")
        return turns[:last]
    if "prompt" in row:
        return row["prompt"] if isinstance(row["prompt"], str) else as_messages(row["prompt"])
    raise ValueError(f"rows have the columns {sorted(row)}: give 'messages' or 'prompt'.")
