"""Data that takes a pass of a network over its rows before training: made once, by all ranks, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_peft.datamodules.answers import cached_answers, evaluating
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source
from lightning_peft.network_record import network_fingerprint


class NetworkPassData(InstructionData):
    """What data with answers (`ModelAnswersData`) and data with token columns (`TokenPassData`) have in common.

    The pass is made in `setup` and kept in Parquet shards keyed by the network's weights, the rows and the settings: a
    killed run goes on where it stood, and a resumed one finds what the network it started from gave.

    Args:
        data: As for `InstructionData`.
        cache_dir: Where results are kept, the same for all ranks; by default `$LIGHTNING_PEFT_CACHE`, else
            `~/.cache/lightning_peft`.
        shard_size: Rows in a shard.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: `shard_size` is below 1, or there is no network to pass the rows through.
    """

    #: The technique's folder in the cache.
    cache_name = "network_pass"

    def __init__(self, data: Source, cache_dir: str | None = None, shard_size: int = 64, **kwargs: Any) -> None:
        super().__init__(data=data, **kwargs)
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} must be at least 1.")
        self.shard_size = shard_size
        cache = cache_dir or os.environ.get("LIGHTNING_PEFT_CACHE") or Path.home() / ".cache" / "lightning_peft"
        self.cache_dir = Path(cache).expanduser() / self.cache_name
        self._fingerprint: str | None = None

    def prepare_data(self) -> None:
        # The pass takes all ranks: it waits for `setup`. Here only what is downloaded is.
        self._raw = self.read()

    def network(self) -> Any:
        """The network in training; `None` without one."""
        return None if self.trainer is None else getattr(self.trainer.lightning_module, "model", None)

    def cached_pass(
        self,
        keys: list[list[int]],
        answer: Callable[[Any, list[list[int]], int], list[dict[str, Any]]],
        settings: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """What `answer` makes of every row, from the cache where it is there.

        Args:
            keys: What tells each row from others, such as its token ids.
            answer: Called with the network (in evaluation mode, without adapters, on the run's device), the keys of a
                shard and the number of its first row.
            settings: Whatever the result depends on besides the network and the rows, JSON.
        """
        network, trainer = self.network(), self.trainer
        device = trainer.strategy.root_device if trainer is not None else next(network.parameters()).device
        with evaluating(network, device), torch.no_grad():
            self._fingerprint = self._fingerprint or network_fingerprint(network)
            return self.in_shards(
                keys,
                lambda shard, number: answer(network, shard, number * self.shard_size),
                {"network": self._fingerprint, **settings},
            )

    def in_shards(
        self, keys: list[Any], answer: Callable[[list[Any], int], list[dict[str, Any]]], settings: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """What `answer` makes of every key, each shard made once, by one of the run's ranks.

        Args:
            keys: JSON values.
            answer: Called with the keys of a shard and its number.
            settings: Whatever the result depends on besides the keys, JSON.
        """
        trainer = self.trainer
        return cached_answers(
            self.cache_dir,
            keys,
            answer,
            settings,
            self.shard_size,
            trainer.global_rank if trainer is not None else 0,
            trainer.world_size if trainer is not None else 1,
            trainer.strategy.barrier if trainer is not None else None,
        )
