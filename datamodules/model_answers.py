"""Data whose rows take a network's answers before they can be learnt from."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.answers import generate_answers, score_choices
from lightning_peft.datamodules.network_pass import NetworkPassData
from lightning_peft.datamodules.sources import Source


class ModelAnswersData(NetworkPassData):
    """Instruction data that asks a network first: what the techniques that do so have in common.

    The network is the one in training before it is trained, without its adapters, or another.

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
        super().__init__(data=data, cache_dir=cache_dir, shard_size=shard_size, **kwargs)
        if self.streaming:
            raise ValueError("streaming=True: answers are generated for a data set at hand; give a part of the stream.")
        self.generation = generation or {}
        self.generation_batch_size = generation_batch_size
        self.model = model

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

        def answer(network: Any, prompts: list[list[int]], begin: int) -> list[dict[str, Any]]:
            if choices is not None:
                offered = choices[begin : begin + len(prompts)]
                return [{"scores": own} for own in score_choices(network, prompts, offered, self.generation_batch_size)]
            rank_zero_info(f"generating answers {begin} to {begin + len(prompts)}")
            seed = self.seed + begin // self.shard_size
            return generate_answers(network, self.tokenizer, prompts, self.generation_batch_size, generation, seed)

        settings = {
            "generation": generation if choices is None else {"choices": choices},
            "generation_batch_size": self.generation_batch_size,
            "seed": self.seed,
        }
        return self.cached_pass(ids, answer, settings)

    def network(self) -> Any:
        """The network that answers.

        Raises:
            ValueError: There is none, or it does not generate.
        """
        if isinstance(self.model, str):
            from lightning_peft.models.pretrained import load_pretrained

            self.model = load_pretrained("AutoModelForCausalLM", self.model)
        network = super().network() if self.model is None else self.model
        if not isinstance(network, torch.nn.Module) or not hasattr(network, "generate"):
            raise ValueError(
                f"{type(self).__name__} has no network to answer: train a CausalLM with it, or give model= by name."
            )
        return network
