"""Data with columns that take a network's pass over the tokenised rows: a value for each token, made once and kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.network_pass import NetworkPassData
from lightning_peft.datamodules.sources import Source

#: A tokenised row: its ids and its labels, of one length.
TokenRow = tuple[list[int], list[int]]


class TokenPassData(NetworkPassData):
    """Instruction data whose documents get further token columns from a network before it is trained.

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
        super().__init__(data=data, cache_dir=cache_dir, shard_size=shard_size, **kwargs)
        if self.streaming:
            raise ValueError(f"{type(self).__name__} passes over all rows before training: streaming=True has no end.")
        if pass_batch_size < 1:
            raise ValueError(f"pass_batch_size={pass_batch_size} must be at least 1.")
        self.pass_batch_size = pass_batch_size

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
        def answer(network: Any, shard: list[list[int]], begin: int) -> list[dict[str, Any]]:
            rank_zero_info(f"{self.cache_name}: {split} rows {begin} to {begin + len(shard)} of {len(rows)}")
            return self.columns(network, rows[begin : begin + len(shard)], rows)

        return self.cached_pass([[*ids, *labels] for ids, labels in rows], answer, self.settings())

    def network(self) -> Any:
        """The network in training.

        Raises:
            ValueError: There is none, or it is no language model.
        """
        network = super().network()
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
