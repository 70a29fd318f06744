"""Selective LoRA: the penalty that closes gates, when it acts, and what became of the gates (arXiv 2501.15377)."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.adapters.injection import network_name
from lightning_peft.adapters.selective_lora import SelectiveLoraConfig, blocks
from lightning_peft.callbacks.peft import PEFT
from lightning_peft.loss_terms import LossTerm, add_loss_terms, remove_loss_terms
from lightning_peft.pictures import new_figure, write_picture

UNITS = ("epoch", "step")


class SelectiveLoRA(PEFT):
    """LoRA on any LightningModule, with a learned gate on every block and a penalty that closes the useless ones.

        L = L_task + sparsity * mean over blocks of |s|

    A block acts while s >= threshold; the penalty is added after `penalty_after`, once B has left zero. Before that the
    task gives the gates no gradient, and a penalty alone would close all of them within (gate_init - threshold) blocks
    / (learning rate * sparsity) steps of SGD. The gates are in the network's own optimizer. Everything that `export`
    writes holds the open blocks only, as ordinary LoRA; a merge adds the open blocks only.

    Logged: `train_gate_sparsity` (the penalty, its coefficient included) and `train_open_blocks` (their share).

    Args:
        r: Rank of every block.
        alpha: A block's update is scaled by alpha / r.
        threshold: tau: a block acts while its gate is at least this.
        gate_init: Where the gates start; TAPS starts them at 0.15.
        sparsity: lambda, the coefficient of the gates' mean absolute value (TAPS: 1, also 0.1 and 0.3).
        penalty_after: The penalty acts after so many epochs or steps (TAPS: 2 epochs).
        penalty_unit: "epoch" or "step" (optimizer steps).
        target_active: The penalty rests while at most this share of the blocks is open (ours; by default it never
            rests). The paper reports that 5% open blocks suffice on CLIP's and DINO's vision transformers.
        dropout: Dropout on a block's input.
        target_modules: Names of linear or convolutional layers, or "all-linear".
        quantization_config: See `callbacks.PEFT`.
        modules_to_save: Names of modules that train whole, besides the task's own.
        autocast_adapter_dtype: Hold the adapter in fp32 where the network is in half precision.
        adapter_name: Name of the adapter; two of these callbacks need two names.
        network: Name of the network inside the module, needed only where it holds more than one.
        picture: Write a map of the gates, by block and layer, beside the checkpoints.

    Raises:
        ValueError: An argument is out of range, a target cannot be gated, or the module uses manual optimisation.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: int = 16,
        threshold: float = 0.1,
        gate_init: float = 0.15,
        sparsity: float = 1.0,
        penalty_after: int = 2,
        penalty_unit: str = "epoch",
        target_active: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | str = "all-linear",
        quantization_config: dict[str, Any] | None = None,
        modules_to_save: list[str] | None = None,
        autocast_adapter_dtype: bool = True,
        adapter_name: str = "default",
        network: str | None = None,
        picture: bool = False,
    ) -> None:
        if sparsity < 0 or penalty_after < 0:
            raise ValueError(f"sparsity={sparsity} and penalty_after={penalty_after} must be at least 0.")
        if penalty_unit not in UNITS:
            raise ValueError(f"penalty_unit={penalty_unit!r} is not known: use one of {UNITS}.")
        if target_active is not None and not 0 < target_active <= 1:
            raise ValueError(f"target_active={target_active} is a share of the blocks and must lie in (0, 1].")
        config = SelectiveLoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=target_modules,
            threshold=threshold,
            gate_init=gate_init,
        )
        super().__init__(
            config, None, quantization_config, modules_to_save, autocast_adapter_dtype, adapter_name, network
        )
        self.threshold = threshold
        self.sparsity, self.penalty_after, self.penalty_unit = sparsity, penalty_after, penalty_unit
        self.target_active, self.picture = target_active, picture
        suffix = "" if adapter_name == "default" else f"_{adapter_name}"
        self._name, self._open = f"gate_sparsity{suffix}", f"train_open_blocks{suffix}"
        self._term = LossTerm([self._name], self._penalty)
        self._blocks: dict[str, Any] = {}

    def gates(self, module: L.LightningModule) -> dict[str, Tensor]:
        """s of every block, [1] each, by the block's name in the network."""
        if not self._blocks:
            network = module.get_submodule(network_name(module, self.network))
            self._blocks = blocks(network, self.adapter_name)
        gates = {name: block.lora_gate[self.adapter_name] for name, block in self._blocks.items()}
        return {name: s.full_tensor() if hasattr(s, "full_tensor") else s for name, s in gates.items()}

    def _penalty(self, module: L.LightningModule) -> dict[str, Tensor]:
        s = torch.cat(list(self.gates(module).values())).float()
        share = (s.detach() >= self.threshold).float().mean()
        module.log(self._open, share, batch_size=1)
        assert self._trainer is not None
        now = self._trainer.current_epoch if self.penalty_unit == "epoch" else self._trainer.global_step
        if now < self.penalty_after:
            return {}
        acts = 1.0 if self.target_active is None else (share > self.target_active).float()
        return {self._name: acts * self.sparsity * s.abs().mean()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            add_loss_terms(pl_module, self._term, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.picture:
            gates = {name: float(s) for name, s in self.gates(pl_module).items()}
            if trainer.is_global_zero:
                draw_gates(trainer, gates, self.threshold, self._name)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        remove_loss_terms(pl_module, self._term)
        self._blocks = {}
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        remove_loss_terms(pl_module, self._term)


def draw_gates(trainer: L.Trainer, gates: dict[str, float], threshold: float, name: str) -> Any:
    """A map of the gates, a row a block and a column a layer of it; closed ones are crossed. Returns the PNG's path."""
    places = {key: re.search(r"(?:^|\.)(\d+)\.(.+)", key) for key in gates}
    cells = {key: (int(place[1]), place[2]) if place else (0, key) for key, place in places.items()}
    rows, columns = sorted({row for row, _ in cells.values()}), list(dict.fromkeys(c for _, c in cells.values()))
    values = torch.full((len(rows), len(columns)), float("nan"))
    figure, axes = new_figure(2 + 0.6 * len(columns), 2 + 0.25 * len(rows))
    for key, (row, column) in cells.items():
        y, x = rows.index(row), columns.index(column)
        values[y, x] = gates[key]
        if gates[key] < threshold:
            axes.text(x, y, "x", ha="center", va="center")
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set(ylabel="block", title=f"gates (x: closed, below {threshold:g})")
    figure.colorbar(image)
    return write_picture(trainer, figure, name)
