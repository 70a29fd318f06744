"""Loss by position in the row, one line for every head that predicts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.pictures import new_figure, write_picture


class PositionLoss(L.Callback):
    """Draws the mean loss at each position of the validation rows, for the network's own head and every further one.

    It reads what `CausalLM.validation_step` returns: `{"terms": StepTerms}`.

    Args:
        path: The picture; by default `position_loss.png` beside the checkpoints.
        smooth: Average over this many neighbouring positions.

    Raises:
        ValueError: `smooth` is below 1.
    """

    def __init__(self, path: str | None = None, smooth: int = 8) -> None:
        if smooth < 1:
            raise ValueError(f"smooth={smooth} must be at least 1.")
        self.path, self.smooth = path, smooth
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=self.path, smooth=self.smooth)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums, self._counts = {}, {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, dict) or "terms" not in outputs:
            raise ValueError("PositionLoss needs a module whose validation_step returns its terms, such as CausalLM.")
        time = batch["labels"].shape[1]
        for name, (places, nll) in outputs["terms"].per_row.items():
            positions = (places % time).cpu()
            for store, values in ((self._sums, nll.detach().float().cpu()), (self._counts, torch.ones(len(nll)))):
                total = store.get(name, torch.zeros(0))
                if len(total) < time:
                    total = torch.cat([total, torch.zeros(time - len(total))])
                store[name] = total.index_add(0, positions, values)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.world_size > 1:
            self._sums, self._counts = _over_ranks(self._sums), _over_ranks(self._counts)
        if not trainer.is_global_zero or not self._sums:
            return
        figure, axes = new_figure()
        window = torch.ones(1, 1, self.smooth)
        for k, name in enumerate(self._sums):
            sums, counts = (
                torch.nn.functional.conv1d(x[name][None, None], window, padding="same")[0, 0]
                for x in (self._sums, self._counts)
            )
            seen = counts > 0
            label = "next token" if name == "loss" else f"{name.replace('_', ' ')} (token t+{k + 1})"
            axes.plot(seen.nonzero().squeeze(1), (sums / counts.clamp(min=1))[seen], label=label)
        axes.set(xlabel="position in the row", ylabel="held-out loss (nats a token)")
        axes.legend()
        write_picture(trainer, figure, "position_loss", self.path)


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds up what every rank has seen; rows may be of other lengths there."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, sums)
    added: dict[str, Tensor] = {}
    for name in sums:
        columns = [own[name] for own in every if name in own]
        added[name] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True).sum(0)
    return added
