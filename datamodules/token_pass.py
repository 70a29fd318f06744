"""Data with columns that take a network's pass over the tokenised rows: a value for each token, made once and kept."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.answers import cached_answers, evaluating, network_fingerprint
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source

#: A tokenised row: its ids and its labels, of one length.
TokenRow = tuple[list[int], list[int]]


class TokenPassData(InstructionData):
    """Instruction data whose documents get further token columns from a network before it is trained.

    The pass is made in `setup`, by all ranks, and kept in Parquet shards keyed by the network's weights, the tokens and
    the settings: a killed run goes on where it stood, and a resumed one finds what the network it started from gave.

    Args:
        data: As for `InstructionData`.
        pass_batch_size: Rows at once.
        cache_dir: Where columns are kept, the same for all ranks; by default `$LIGHTNING_PEFT_CACHE`, else
            `~/.cache/lightning_peft`.
        shard_size: Rows in a shard.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: A stream, or there is no network to pass the rows through.
    """

    #: The technique's folder in the cache.
    cache_name = "token_pass"
    #: Splits that get the columns.
    passed_splits: tuple[str, ...] = ("train", "validation", "test")

    def __init__(
        self,
        data: Source,
        pass_batch_size: int = 8,
        cache_dir: str | None = None,
        shard_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, **kwargs)
        if self.streaming:
            raise ValueError(f"{type(self).__name__} passes over all rows before training: streaming=True has no end.")
        if pass_batch_size < 1 or shard_size < 1:
            raise ValueError(f"pass_batch_size={pass_batch_size} and shard_size={shard_size} must be at least 1.")
        self.pass_batch_size, self.shard_size = pass_batch_size, shard_size
        cache = cache_dir or os.environ.get("LIGHTNING_PEFT_CACHE") or Path.home() / ".cache" / "lightning_peft"
        self.cache_dir = Path(cache).expanduser() / self.cache_name
        self._fingerprint: str | None = None

    # -- what a technique says ------------------------------------------------------------------------------------

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Whatever the columns depend on besides the network and the tokens, JSON."""

    @abstractmethod
    def columns(self, network: Any, rows: list[TokenRow], every_row: list[TokenRow]) -> list[dict[str, Any]]:
        """The columns of `rows` (a shard), by name, each with a value for each token.

        Args:
            network: In evaluation mode, on the run's device, under `no_grad`.
            rows: Tokenised rows.
            every_row: Those of the whole split.
        """

    # -- rows -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        # The pass takes all ranks: it waits for `setup`. Here only what is downloaded is.
        self._raw = self.read()

    def documents(self, split: str) -> Any:
        import datasets

        made = super().documents(split)
        if split not in self.passed_splits:
            return made
        tokens = made.with_format(None)
        rows = list(zip(tokens["input_ids"][:], tokens["labels"][:]))
        columns = datasets.Dataset.from_list(self._passed(rows, split))
        return datasets.concatenate_datasets([made, columns], axis=1)

    def _passed(self, rows: list[TokenRow], split: str) -> list[dict[str, Any]]:
        network, trainer = self._network(), self.trainer
        device = trainer.strategy.root_device if trainer is not None else next(network.parameters()).device
        with evaluating(network, device), torch.no_grad():
            self._fingerprint = self._fingerprint or network_fingerprint(network)

            def answer(shard: list[list[int]], number: int) -> list[dict[str, Any]]:
                begin = number * self.shard_size
                rank_zero_info(f"{self.cache_name}: {split} rows {begin} to {begin + len(shard)} of {len(rows)}")
                return self.columns(network, rows[begin : begin + len(shard)], rows)

            return cached_answers(
                self.cache_dir,
                [[*ids, *labels] for ids, labels in rows],
                answer,
                {"network": self._fingerprint, **self.settings()},
                self.shard_size,
                trainer.global_rank if trainer is not None else 0,
                trainer.world_size if trainer is not None else 1,
                trainer.strategy.barrier if trainer is not None else None,
            )

    def _network(self) -> Any:
        network = None if self.trainer is None else getattr(self.trainer.lightning_module, "model", None)
        if not isinstance(network, torch.nn.Module) or not hasattr(network, "get_output_embeddings"):
            raise ValueError(
                f"{type(self).__name__} has no network to pass its rows through: train a CausalLM (or another module "
                "with a causal language model under `model`, built in its constructor) with it."
            )
        return network

    def batches(self, rows: list[TokenRow], device: torch.device) -> Any:
        """Padded batches of `pass_batch_size` rows on the device, and the slice of `rows` that each holds."""
        join = self.collate_fn()
        for begin in range(0, len(rows), self.pass_batch_size):
            part = rows[begin : begin + self.pass_batch_size]
            batch = join([{"input_ids": ids, "labels": labels} for ids, labels in part])
            yield {name: value.to(device) for name, value in batch.items()}, part
