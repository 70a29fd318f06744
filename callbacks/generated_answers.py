"""The base of callbacks that let the network answer questions in validation and test, and score what it says."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as L
import torch


class GeneratedAnswers(L.Callback):
    """Asks questions after each validation and test and logs the scores, exact over ranks.

    A subclass answers `scores`; the rest is here.

    Args:
        questions: Rows with `prompt` (a text, or messages) and `answer`.
        batch_size: Texts generated at once.

    Raises:
        ValueError: Questions lack a column, or the module has no tokenizer.
    """

    #: Names under which the scores are logged, behind "val_" or "test_".
    score_names: tuple[str, ...]

    def __init__(self, questions: list[dict[str, str | Any]], batch_size: int = 8) -> None:
        if not questions or any("prompt" not in row or "answer" not in row for row in questions):
            raise ValueError("questions must be rows with 'prompt' and 'answer', at least one.")
        # Unquoted in a YAML, 35 is a number.
        self.questions = [{**row, "answer": str(row["answer"])} for row in questions]
        self.batch_size = batch_size

    @abstractmethod
    def scores(self, module: Any, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        """Sums of each score over this rank's questions, and how many they are; [scores + 1] in float64.

        Args:
            module: The module; in evaluation mode.
            rank: This process.
            ranks: Processes that share the questions.
        """

    def numbers(self, rank: int, ranks: int) -> list[int]:
        """Numbers of this rank's questions, as many on every rank: under FSDP2 every forward is collective.

        Where the questions do not divide by the ranks the last numbers are past the end: ask any, count none.
        """
        return [rank + place * ranks for place in range(-(-len(self.questions) // ranks))]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if getattr(pl_module, "tokenizer", None) is None:
            name = type(self).__name__
            raise ValueError(f"{name} writes text: it needs a module with a tokenizer, such as CausalLM.")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        total = self.scores(pl_module, trainer.global_rank, trainer.world_size)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total.to(pl_module.device), reduce_op="sum").cpu()
        for name, value in zip(self.score_names, (total[:-1] / total[-1]).tolist(), strict=True):
            pl_module.log(f"{stage}_{name}", value)
