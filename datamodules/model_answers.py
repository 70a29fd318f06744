"""Data whose rows take a network's answers before they can be learnt from."""

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
    score_choices,
)
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source


class ModelAnswersData(InstructionData):
    """Instruction data that asks a network first: what the techniques that do so have in common.

    Answers are made once, in `setup`, by all ranks, and kept in Parquet shards keyed by the network's weights, the
    prompts and the settings; a killed run goes on where it stood. The network is the one in training before it is
    trained, without its adapters, or another.

    Args:
        data: As for `InstructionData`.
        generation: Arguments of `generate`.
        generation_batch_size: Prompts at once.
        cache_dir: Where answers are kept, the same for all ranks; by default `$LIGHTNING_PEFT_CACHE`, else
            `~/.cache/lightning_peft`.
        shard_size: Prompts in a shard.
        model: Another network to answer, by name, path or GGUF file; by default the one in training.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: No network that generates, or a stream.
    """

    #: The technique's folder in the cache.
    cache_name = "answers"

    def __init__(
        self,
        data: Source,
        generation: dict[str, Any] | None = None,
        generation_batch_size: int = 8,
        cache_dir: str | None = None,
        shard_size: int = 64,
        model: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, **kwargs)
        if self.streaming:
            raise ValueError("streaming=True: answers are generated for a data set at hand; give a part of the stream.")
        self.generation = generation or {}
        self.generation_batch_size, self.shard_size = generation_batch_size, shard_size
        cache = cache_dir or os.environ.get("LIGHTNING_PEFT_CACHE") or Path.home() / ".cache" / "lightning_peft"
        self.cache_dir = Path(cache).expanduser() / self.cache_name
        self.model = model
        self._fingerprint: str | None = None

    def prepare_data(self) -> None:
        # Generating takes all ranks: it waits for `setup`. Here only what is downloaded is.
        self._raw = self.read()

    def answers(
        self, ids: list[list[int]], generation: dict[str, Any], choices: list[list[list[int]]] | None = None
    ) -> list[dict[str, Any]]:
        """The network's answer to each prompt, from the cache where it is there.

        Args:
            ids: Token ids of each prompt.
            generation: Arguments of `generate`.
            choices: Instead of generating, score these continuations: token ids of each prompt's choices.

        Returns:
            For each prompt `answer` and `finished` as `generate_answers` gives them, or with `choices` its `scores`.
        """
        network = self.network()
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer is not None else next(network.parameters()).device
        with evaluating(network, device):
            self._fingerprint = self._fingerprint or network_fingerprint(network)

            def answer(prompts: list[list[int]], number: int) -> list[dict[str, Any]]:
                begin = number * self.shard_size
                if choices is not None:
                    offered = choices[begin : begin + len(prompts)]
                    scores = score_choices(network, prompts, offered, self.generation_batch_size)
                    return [{"scores": own} for own in scores]
                rank_zero_info(f"generating answers {begin} to {begin + len(prompts)}")
                return generate_answers(
                    network, self.tokenizer, prompts, self.generation_batch_size, generation, self.seed + number
                )

            return cached_answers(
                self.cache_dir,
                ids,
                answer,
                {
                    "network": self._fingerprint,
                    "generation": generation if choices is None else {"choices": choices},
                    "generation_batch_size": self.generation_batch_size,
                    "seed": self.seed,
                },
                self.shard_size,
                trainer.global_rank if trainer is not None else 0,
                trainer.world_size if trainer is not None else 1,
                trainer.strategy.barrier if trainer is not None else None,
            )

    def network(self) -> Any:
        """The network that answers.

        Raises:
            ValueError: There is none, or it does not generate.
        """
        if isinstance(self.model, str):
            from lightning_peft.models.pretrained import load_pretrained

            self.model = load_pretrained("AutoModelForCausalLM", self.model)
        network = self.model
        if network is None and self.trainer is not None:
            network = getattr(self.trainer.lightning_module, "model", None)
        if not isinstance(network, torch.nn.Module) or not hasattr(network, "generate"):
            raise ValueError(
                f"{type(self).__name__} has no network to answer: train a CausalLM with it, or give model= by name."
            )
        return network
