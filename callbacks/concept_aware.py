"""What happens around concept-aware fine-tuning: the stage switch "heads, then model", and the heads' own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_peft.checkpoint import resumed_callback_state
from lightning_peft.host_copies import reshard
from lightning_peft.objectives.auxiliary_heads import AuxiliaryHeads, save_heads
from lightning_peft.objectives.concept_aware import AuxiliaryHeadPretraining, ConceptAwareFineTuning


def objective_of(pl_module: L.LightningModule, needs: str) -> ConceptAwareFineTuning:
    """The module's concept-aware objective; raises, naming the callback `needs`, if there is none with heads."""
    for objective in getattr(pl_module, "objectives", []):
        if isinstance(objective, ConceptAwareFineTuning) and objective.predicted_tokens > 1:
            return objective
    raise ValueError(
        f"{needs} needs a module with auxiliary heads and {type(pl_module).__name__} has none: use "
        "ConceptAwareFineTuningMixin (or AuxiliaryHeadPretrainingMixin) with predicted_tokens of at least 2."
    )


class AuxiliaryHeadSchedule(L.Callback):
    """First the heads on the task's own data, then the model: CAFT's optional task pre-training of its heads.

    In the first stage everything but the heads is frozen and the loss is the heads' alone (beta 1, gamma constant). At
    the border `requires_grad` is put back as it was and the joint stage starts with a fresh optimizer and schedule over
    the steps that are left; gamma counts from there. Needs `finetune_heads=True`.

    Args:
        heads_epochs: Epochs of the first stage.
        heads_learning_rate: Its learning rate.
        heads_warmup_steps: Its linear warm-up, in optimizer steps.

    Raises:
        ValueError: The module has no trainable auxiliary heads, or fewer epochs run than the first stage takes.
    """

    def __init__(self, heads_epochs: int = 1, heads_learning_rate: float = 1e-4, heads_warmup_steps: int = 50) -> None:
        if heads_epochs < 1:
            raise ValueError(
                f"heads_epochs={heads_epochs} must be at least 1; without a first stage, drop the callback."
            )
        self.heads_epochs = heads_epochs
        self.heads_learning_rate, self.heads_warmup_steps = heads_learning_rate, heads_warmup_steps
        self.stage, self.start = "heads", 0
        self._joint: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage, self.start = state_dict["stage"], state_dict["start"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self._joint:
            return
        objective = objective_of(pl_module, type(self).__name__)
        if isinstance(objective, AuxiliaryHeadPretraining) or not objective.finetune_heads:
            raise ValueError("AuxiliaryHeadSchedule trains the heads first: set finetune_heads=True on the mixin.")
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.heads_epochs:
            raise ValueError(
                f"heads_epochs={self.heads_epochs} leaves no epoch for the model: max_epochs={trainer.max_epochs}."
            )
        # The stage must be known before optimizers are made, and they are made before callbacks are restored (FSDP2).
        self.load_state_dict(resumed_callback_state(trainer, self.state_key) or {"stage": "heads", "start": 0})
        self._joint = {
            "trained": [name for name, p in pl_module.named_parameters() if p.requires_grad],
            "coefficient": objective.heads_coefficient,
            "schedule": objective.heads_schedule,
            "learning_rate": pl_module.learning_rate,
            "warmup_steps": pl_module.warmup_steps,
        }
        self._apply(pl_module, self.stage, self.start)

    def _apply(self, pl_module: Any, stage: str, start: int) -> None:
        objective = objective_of(pl_module, type(self).__name__)
        heads = stage == "heads"
        joint = self._joint
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in joint["trained"] and (not heads or name.startswith("auxiliary_heads.")))
        objective.replaces_main = heads
        objective.heads_coefficient = 1.0 if heads else joint["coefficient"]
        objective.heads_schedule = "constant" if heads else joint["schedule"]
        pl_module.learning_rate = self.heads_learning_rate if heads else joint["learning_rate"]
        pl_module.warmup_steps = self.heads_warmup_steps if heads else joint["warmup_steps"]
        pl_module.schedule_start = start

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._switch(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Resumed from a checkpoint of an epoch's last batch, Lightning begins the next epoch without its start hook.
        self._switch(trainer, pl_module)

    def _switch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stage == "model" or trainer.current_epoch < self.heads_epochs:
            return
        self.stage, self.start = "model", trainer.global_step
        reshard(pl_module)  # what FSDP2 still holds gathered would not learn that it trains now
        self._apply(pl_module, self.stage, self.start)
        # A fresh optimizer and schedule is what the paper's recipe asks for; DDP reduces what trained when it wrapped.
        trainer.strategy.setup_optimizers(trainer)
        if isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel):
            trainer.strategy.model = trainer.strategy._setup_model(pl_module)
        rank_zero_info(f"concept-aware fine-tuning: heads are trained, the model trains from step {self.start} on")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self._joint:
            return
        self._apply(pl_module, "model", 0)  # leave the module as the user configured it; our own state stays
        self._joint = {}


class AuxiliaryHeadCheckpoint(L.Callback):
    """Writes the heads alone, to be given as `heads=` to concept-aware fine-tuning of the same base.

    Args:
        path: The file; by default `heads.safetensors` beside the run's checkpoints.
        monitor: Write when this logged value (`val_multi_token_loss`) is the lowest so far; by default every epoch.
    """

    def __init__(self, path: str | None = None, monitor: str | None = None) -> None:
        self.path, self.monitor = path, monitor
        self.best = float("inf")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=self.path, monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            objective_of(pl_module, type(self).__name__)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(f"monitor={self.monitor!r} was not logged; use one of {sorted(trainer.callback_metrics)}.")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best:
            self.best = value
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the heads on rank zero; under FSDP2 every rank helps to gather them."""
        heads: AuxiliaryHeads = pl_module.auxiliary_heads
        state: dict[str, Tensor] = {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for name, tensor in heads.state_dict().items()
        }
        if trainer.is_global_zero:
            folder = trainer.checkpoint_callback.dirpath if trainer.checkpoint_callback else None  # type: ignore[attr-defined]
            save_heads(heads, self.path or Path(folder or trainer.default_root_dir) / "heads.safetensors", state)
