"""Model editing by ordinary fine-tuning of one place, breadth-first (LocFT-BF, arXiv 2509.22072, ICLR 2026, paper 34).

All edits are shuffled every epoch and learnt in mini-batches, as in any fine-tuning, rather than one after the other to
convergence, where later edits undo earlier ones. What matters besides is the place: one matrix, found by a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_peft.callbacks.layer_freezing import named_weights
from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.loss_terms import add_loss_terms, remove_loss_terms
from lightning_peft.models.fine_tuning_module import FineTuningModule
from lightning_peft.objectives.edit_mean import EditMean
from lightning_peft.roles import Weight


class LocalizedEditing(WeightSelection):
    """Trains one place of the network on edits, until they are learnt.

    An optimizer step whose loss (over its micro-batches and ranks) is already below `loss_floor` is not taken: neither
    weights nor moments move. Training stops at the end of an epoch whose mean loss is below it. On a `FineTuningModule`
    the loss is the mean over an edit's tokens and then over edits; other modules keep their own. The paper trains for
    at most 25 epochs (`Trainer(max_epochs=25)`) with Adam, a constant rate (5e-4 for one matrix, 5e-5 for a block), no
    weight decay and no dropout, 100 edits in a batch.

    Args:
        layers: Positions of the blocks, exactly (from 0, negative from the end). The paper's places: layer 22 of
            Llama-3-8B, 6 of Qwen2.5-7B, with the down projection; the whole block 23 of Mistral-7B.
        modules: What of these blocks trains: a module's name such as "down_proj", a role such as "ffn.down", or "block"
            for all of it.
        loss_floor: The loss that is low enough; 0 for none.
        picture: Write a map of what trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: `layers` is empty, a layer or a module is not there, or `loss_floor` is negative.
    """

    def __init__(
        self,
        layers: list[int] | int,
        modules: list[str] | str = "down_proj",
        loss_floor: float = 1e-2,
        picture: bool = False,
    ) -> None:
        super().__init__("never", picture)
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        if not self.layers or not self.modules:
            raise ValueError(f"layers={layers}, modules={modules}: name at least one block and one part of it.")
        if loss_floor < 0:
            raise ValueError(f"loss_floor={loss_floor} must be 0 or more.")
        self.loss_floor = loss_floor
        self.skipped = 0  # steps not taken
        self._objective = EditMean()
        self._loss: Tensor | None = None  # of the step under way
        self._epoch_loss, self._epoch_steps = 0.0, 0

    def arguments(self) -> dict[str, Any]:
        return {"layers": self.layers, "modules": self.modules, "loss_floor": self.loss_floor}

    def state_dict(self) -> dict[str, Any]:
        own = {"skipped": self.skipped, "epoch_loss": self._epoch_loss, "epoch_steps": self._epoch_steps}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skipped = state_dict["skipped"]
        self._epoch_loss, self._epoch_steps = state_dict["epoch_loss"], state_dict["epoch_steps"]

    # -- what trains ----------------------------------------------------------------------------------------------

    def candidates(self, weights: list[Weight]) -> set[str]:
        own = [w for w in weights if w.role not in ("adapter", "beside")]
        chosen = self.select(weights, 0)
        parameters = dict(self._module.named_parameters()) if self._module is not None else {}
        return {w.name for w in own if w.name in chosen or parameters[w.name].is_floating_point()}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        own = [w for w in weights if w.role not in ("adapter", "beside")]
        names: set[str] = set()
        for layer in self.layers:
            block = named_weights(f"block:{layer}", own, "LocalizedEditing: layers")
            inside = [w for w in own if w.name in block]
            for module in self.modules:
                names |= block if module == "block" else named_weights(module, inside, "LocalizedEditing: modules")
        return names

    # -- when it is enough ----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._loss = None
            if isinstance(pl_module, FineTuningModule):
                add_loss_terms(pl_module, self._objective, "LocalizedEditing")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # Already divided by the accumulation, and of ours also multiplied by the ranks: sums and means are the step's.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        value = loss.detach() / (scaler.get_scale() if scaler is not None else 1)
        self._loss = value if self._loss is None else self._loss + value

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._loss is None:
            return
        loss = float(trainer.strategy.reduce(self._loss, reduce_op="mean"))
        self._loss = None
        self._epoch_loss, self._epoch_steps = self._epoch_loss + loss, self._epoch_steps + 1
        if loss < self.loss_floor:
            self.skipped += 1
            # Optimizers pass over what has no gradient: no moment moves and nothing decays.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mean = self._epoch_loss / max(self._epoch_steps, 1)
        if self._epoch_steps and mean < self.loss_floor:
            rank_zero_info(f"LocalizedEditing: the epoch's mean loss is {mean:.3g}, below {self.loss_floor}: learnt.")
            trainer.should_stop = True
        self._epoch_loss, self._epoch_steps = 0.0, 0

    def _release(self) -> None:
        module = self._module
        super()._release()
        if module is not None:
            remove_loss_terms(module, self._objective)


def sweep_locations(
    make_module: Callable[[], L.LightningModule],
    data: L.LightningDataModule,
    evaluate: Callable[[L.LightningModule, L.LightningModule], dict[str, float]],
    layers: Sequence[int],
    modules: Sequence[str] = ("down_proj",),
    loss_floor: float = 1e-2,
    **trainer: Any,
) -> list[dict[str, Any]]:
    """Edits at each place for a little and tells what came of it: where to edit is to be tried, not guessed.

    Args:
        make_module: Makes the module anew, with the base's weights.
        data: A few edits.
        evaluate: Scores of an edited module beside the base, such as `EditEvaluation(edits).compare`.
        layers: Blocks to try.
        modules: Parts of them to try, each as for `LocalizedEditing`.
        loss_floor: As there.
        **trainer: Arguments of each run's Trainer, such as `max_epochs`.

    Returns:
        A row for each place, with `layer`, `module` and the scores, the best (by the mean of its scores) first; the
        table is printed too.
    """
    rows: list[dict[str, Any]] = []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    for layer in layers:
        for name in modules:
            module = make_module()
            callbacks: list[L.Callback] = [LocalizedEditing(layer, name, loss_floor)]
            L.Trainer(callbacks=callbacks, limit_val_batches=0, **{**quiet, **trainer}).fit(module, data)
            rows.append({"layer": layer, "module": name, **evaluate(module, make_module())})
    scores = [key for key in rows[0] if key not in ("layer", "module")] if rows else []
    rows.sort(key=lambda row: -sum(row[score] for score in scores))
    lines = [f"{'layer':>6} {'module':>12}" + "".join(f"{score:>16}" for score in scores)]
    for row in rows:
        lines.append(f"{row['layer']:>6} {row['module']:>12}" + "".join(f"{row[score]:>16.3f}" for score in scores))
    rank_zero_info("\n".join(lines))
    return rows
