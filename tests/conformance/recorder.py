"""What a conformance run tells about itself."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.parts import leaves_of


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered from all ranks if it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().clone()


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every tensor of the module's own state, by name; a collective call under FSDP2."""
    return {name: whole(value) for name, value in module.state_dict().items() if isinstance(value, Tensor)}


class Recorder(L.Callback):
    """Keeps each step's loss and the weights before the first step; seeds; kills the process at a step.

    Stands first among the callbacks, so that those that draw random numbers in `setup` draw the same in every way of
    use.

    Args:
        kill_at: SIGKILL to the own process in the backward of this optimizer step (0 is the first).
        watch: After every step, compare what changed with what the optimizers hold.
        seed: Seed of every generator.
    """

    def __init__(self, kill_at: int | None = None, watch: bool = False, seed: int = 0) -> None:
        self.kill_at, self.watch, self.seed = kill_at, watch, seed
        self.losses: dict[int, float] = {}  # by optimizer step, summed over its micro-batches
        self.before: dict[str, Tensor] = {}
        self.strayed: list[str] = []
        self._step = 0
        self._held: dict[str, Tensor] = {}
        self._owned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        L.seed_everything(self.seed, verbose=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = weights_of(pl_module)
        L.seed_everything(self.seed, verbose=False)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.kill_at is not None and trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        if self.watch:
            self._held = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self._held |= {name: b.detach().clone() for name, b in pl_module.named_buffers()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.watch:
            held = {id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]}
            self._owned = {name for name, p in pl_module.named_parameters() if id(p) in held and p.requires_grad}
            for path, part in pl_module.named_modules():  # a part's leaf stands for its weight
                pairs = {f"{path}.{leaf}": f"{path}.{weight}" for leaf, weight in leaves_of(part).items()}
                self._owned |= {weight for leaf, weight in pairs.items() if leaf in self._owned}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses[self._step] = self.losses.get(self._step, 0.0) + float(outputs["loss"])
        if self.watch:
            now = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
            changed = {n for n, old in self._held.items() if n in now and not torch.equal(old, now[n].detach())}
            self.strayed += [f"{name} at step {trainer.global_step}" for name in sorted(changed - self._owned)]
