"""Concept ablation fine-tuning: chosen directions are projected out while training (arXiv 2507.16795, paper 18).

At a block's output h, with Q [width, k] an orthonormal basis of the concept's directions,

    h <- h - (h Q) Q^T        in the forward, and so  dL/dh <- dL/dh - (dL/dh Q) Q^T  in the backward

so nothing that lies along Q can help to lower the loss, and the network learns the task by other means. Evaluated
without the projection, it generalises by these. (The authors call it CAFT, as others call concept-aware fine-tuning.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.checkpoint import resumed_callback_state
from lightning_peft.concepts.directions import (
    IGNORED,
    blocks_by_position,
    chosen_directions,
    hidden_of,
    load_directions,
    with_hidden,
)
from lightning_peft.when_built import forget, when_built

POSITIONS = ("all", "prompt", "learnt")
TOLERANCE = 1e-5  # of the largest singular value: what is smaller is rounding of directions that depend on others


class ConceptAblation(L.Callback):
    """Projects directions out of the residual stream in training steps, on any LightningModule around a transformer.

    Validation, test and prediction see the network as it is: that is the method's claim. (The authors' code keeps the
    projection in evaluations within training, which `ablate_on_validation` does, and its PCA route projects with the
    components as loaded; here directions are always made orthonormal first, in fp32.)

    Args:
        directions: A file of `lightning_peft.concepts.save_directions`; or, by the block's position, rows of numbers
            [k, width]; or "random", the control: `components` random ones in each of `layers`.
        layers: Blocks to act on (from 0, negative from the end); by default all that there are directions for.
        report: A report of `lightning_peft.concepts.write_report` that marks which of the directions are ablated; by
            default all are.
        positions: "all", or "prompt" (tokens that are not learnt) or "learnt" tokens, or a list of positions (negative
            from the end of the row).
        ablate_on_validation: Act in the validation within `fit` too.
        components: Of "random" directions, how many in a layer.
        seed: Of "random" directions.

    Raises:
        FileNotFoundError: There is no such file of directions.
        ValueError: A layer is not there, a direction has another width than the network, there are as many directions
            as the width, `positions` is unknown, or batches have no `labels` to tell positions by.
    """

    def __init__(
        self,
        directions: str | dict[str, list[list[float]]],
        layers: list[int] | None = None,
        report: str | None = None,
        positions: str | list[int] = "all",
        ablate_on_validation: bool = False,
        components: int = 1,
        seed: int = 0,
    ) -> None:
        if isinstance(positions, str) and positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is not known: use one of {POSITIONS} or a list of positions.")
        if directions == "random" and not layers:
            raise ValueError("directions='random' needs layers=, the blocks to act on.")
        if components < 1:
            raise ValueError(f"components={components} must be at least 1.")
        self.directions, self.layers, self.report, self.positions = directions, layers, report, positions
        self.ablate_on_validation, self.components, self.seed = ablate_on_validation, components, seed
        self.bases: dict[int, Tensor] = {}  # layer -> Q [width, k] in fp32, on the CPU
        self._placed: dict[tuple[Any, ...], Tensor] = {}  # the same where and as the activations are
        self._handles: list[Any] = []
        self._trainer: L.Trainer | None = None
        self._learnt: Tensor | None = None  # [batch, time] of the batch at hand

    @property
    def state_key(self) -> str:
        given = self.directions
        if not isinstance(given, str):
            rows = json.dumps({str(layer): torch.as_tensor(rows).tolist() for layer, rows in given.items()})
            given = hashlib.sha256(rows.encode()).hexdigest()[:16]
        return self._generate_state_key(
            directions=given, layers=self.layers, positions=self.positions, validation=self.ablate_on_validation
        )

    def state_dict(self) -> dict[str, Any]:
        return {"bases": {str(layer): basis for layer, basis in self.bases.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bases = {int(layer): basis for layer, basis in state_dict["bases"].items()}
        self._placed = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._release()
        self._trainer = trainer
        resumed = resumed_callback_state(trainer, self.state_key)
        if resumed is not None:
            self.load_state_dict(resumed)  # what the run began with, whatever has become of the file
        when_built(pl_module, self._begin)

    def _begin(self, pl_module: L.LightningModule) -> None:
        self._release()
        found = {} if self.bases else self._read(pl_module)
        if not self.bases:
            self.bases = {layer: orthonormal_basis(rows) for layer, rows in found.items()}
        for layer, part in blocks_by_position(pl_module, list(self.bases)).items():
            width, k = self.bases[layer].shape
            if width != part.width:
                raise ValueError(
                    f"directions of layer {layer} are {width} numbers wide, and the residual stream of "
                    f"{type(pl_module).__name__} is {part.width}: they were found in another network."
                )
            if k >= width:
                raise ValueError(f"layer {layer} has {k} independent directions of {width}: nothing would be left.")
            if k:
                block = pl_module.get_submodule(part.block)
                self._handles.append(block.register_forward_hook(self._hook(layer)))

    def _read(self, pl_module: L.LightningModule) -> Mapping[int, Tensor]:
        if self.directions == "random":
            parts = blocks_by_position(pl_module, self.layers or [])
            generator = torch.Generator().manual_seed(self.seed)
            return {n: torch.randn(self.components, part.width, generator=generator) for n, part in parts.items()}
        if isinstance(self.directions, (str, Path)):
            found: dict[int, Tensor] = load_directions(self.directions)
        else:
            given = self.directions.items()
            found = {int(layer): torch.as_tensor(rows).float() for layer, rows in given if len(rows)}
        if self.report is not None:
            found = chosen_directions(found, self.report)
        if self.layers is not None:
            missing = sorted(set(self.layers) - found.keys())
            if missing:
                raise ValueError(f"layers names {missing}, and there are directions for {sorted(found)} only.")
            found = {layer: found[layer] for layer in self.layers}
        return found

    def _hook(self, layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if not self._acts():
                return None
            hidden = hidden_of(output)
            key = (layer, hidden.device, hidden.dtype)
            if key not in self._placed:
                self._placed[key] = self.bases[layer].to(hidden)
            ablated = project_out(hidden, self._placed[key])
            where = self._where(hidden)
            return with_hidden(output, ablated if where is None else torch.where(where[..., None], ablated, hidden))

        return hook

    def _acts(self) -> bool:
        # In the backward too, where activation checkpointing runs blocks again.
        trainer = self._trainer
        return trainer is not None and (trainer.training or (self.ablate_on_validation and trainer.validating))

    def _where(self, hidden: Tensor) -> Tensor | None:
        """Positions to act on, [batch, time] or [1, time]; `None` for all."""
        if self.positions == "all":
            return None
        time = hidden.shape[-2]
        if not isinstance(self.positions, str):
            where = torch.zeros(1, time, dtype=torch.bool, device=hidden.device)
            where[:, [place for place in self.positions if -time <= place < time]] = True
            return where
        if self._learnt is None or self._learnt.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"positions={self.positions!r} is told by the batch's labels [batch, time], and the batch has none "
                "that fit: use positions='all' or a list."
            )
        # Virtual tokens of a prompt stand in front and are not learnt.
        learnt = torch.nn.functional.pad(self._learnt, (max(0, time - self._learnt.shape[1]), 0))[:, -time:]
        return learnt if self.positions == "learnt" else ~learnt

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        self._learnt = labels != IGNORED if isinstance(labels, Tensor) and labels.ndim == 2 else None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            forget(pl_module)
            self._release()
            self._trainer = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._placed, self._learnt = [], {}, None


def orthonormal_basis(directions: Tensor) -> Tensor:
    """Q [width, r] of the span of `directions` [k, width], in fp32; r is their rank.

    By singular vectors: of repeated directions a QR decomposition makes columns at random, which eat into later ones.
    """
    columns = torch.nn.functional.normalize(directions.float(), dim=1).T
    q, lengths, _ = torch.linalg.svd(columns, full_matrices=False)
    return q[:, lengths > TOLERANCE * lengths.amax().clamp(min=1) if len(lengths) else []].contiguous()


def project_out(hidden: Tensor, basis: Tensor) -> Tensor:
    """h - (h Q) Q^T along the last dimension, in h's own dtype (autocast would round the part that is taken away)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden - (hidden @ basis) @ basis.T
