"""The run's losses as one picture."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from lightning_peft.pictures import new_figure, write_picture


class LossCurves(L.Callback):
    """Keeps what the run logs as losses, over resumes, and draws it at the end of every fit.

    Args:
        names: Logged names to draw; by default every one that contains "loss" or "head_".
        path: The picture; by default `loss_curves.png` beside the checkpoints.
        every_n_steps: Keep a point every so many optimizer steps.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, names: list[str] | None = None, path: str | None = None, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1.")
        self.names, self.path, self.every_n_steps = names, path, every_n_steps
        #: name -> [[step, value], ...]; a value stays on its device until it is drawn or saved.
        self.curves: dict[str, list[list[Any]]] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(names=self.names, path=self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.values()}

    def values(self) -> dict[str, list[list[float]]]:
        """The curves so far, name -> [[step, value], ...]."""
        return {name: [[step, float(value)] for step, value in points] for name, points in self.curves.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = state_dict["curves"]

    def _keep(self, trainer: L.Trainer, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            wanted = name in self.names if self.names else ("loss" in name or "head_" in name)
            if wanted and name.startswith(prefix):
                self.curves.setdefault(name, []).append([trainer.global_step, value.detach().clone()])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = next((points[-1][0] for name, points in self.curves.items() if name.startswith("train_")), 0)
        if trainer.global_step - last >= self.every_n_steps:
            self._keep(trainer, "train_")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep(trainer, "val_")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self.curves:
            return
        figure, axes = new_figure()
        for name, points in sorted(self.values().items()):
            steps, values = zip(*points)
            axes.plot(steps, values, label=name, marker="o" if len(steps) < 3 or name.startswith("val_") else None)
        axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
        axes.legend()
        write_picture(trainer, figure, "loss_curves", self.path)
