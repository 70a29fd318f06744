"""Lightning's ModelCheckpoint with files that hold what changed, not the base."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.adapters.injection import network_name
from lightning_peft.delta import base_digests, check_on_load, make_delta
from lightning_peft.network_record import network_record
from lightning_peft.when_built import forget, when_built


class DeltaCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose files leave out every weight that still equals the base.

    All of ModelCheckpoint's options and file names hold; optimizer, callbacks and loops are in the file as ever, so
    `trainer.fit(ckpt_path=...)` and `trainer.test(ckpt_path="best")` work. A file carries the names and shapes of what
    it holds and a digest of each weight it leaves out: it is loaded only into the same adapters on the same base.
    Under ModelParallelStrategy it is one file, also where `save_distributed_checkpoint` would write a folder.

    Weights that a selection trains later in the same process are no longer the base for a file written before: load
    such a file into a module that is built anew.

    Args:
        dirpath: Folder; by default that of ModelCheckpoint.
        filename: As for ModelCheckpoint.
        **kwargs: Its further arguments.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, **kwargs: Any) -> None:
        super().__init__(dirpath=dirpath, filename=filename, **kwargs)
        self._base: dict[str, str] = {}
        self._of: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_on_load(trainer)
        if stage == "fit" and (self._of is None or self._of() is not pl_module):
            when_built(pl_module, self._remember)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        forget(pl_module)
        super().teardown(trainer, pl_module, stage)

    def _remember(self, pl_module: L.LightningModule) -> None:
        # Lightning sets checkpoint callbacks up last, so adapters are in place; a checkpoint is restored later.
        self._base, self._of = base_digests(pl_module), weakref.ref(pl_module)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        strategy = trainer.strategy
        own = strategy.__dict__.get("save_checkpoint")
        original = strategy.save_checkpoint
        distributed = getattr(strategy, "_save_distributed_checkpoint", False)

        def save(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            module = trainer.lightning_module
            record = _record(module)
            make_delta(checkpoint, self._base, module, (record or {}).get("name_or_path", ""))
            if record and "delta" in checkpoint:
                checkpoint["delta"]["network"] = json.dumps(record)
            original(checkpoint, *args, **kwargs)

        strategy.save_checkpoint = save  # type: ignore[method-assign]
        if distributed:  # a planner refuses a part of the weights, and a delta is small: one file
            strategy._save_distributed_checkpoint = False  # type: ignore[attr-defined]
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            if own is None:
                del strategy.save_checkpoint
            else:
                strategy.save_checkpoint = own  # type: ignore[method-assign]
            if distributed:
                strategy._save_distributed_checkpoint = True  # type: ignore[attr-defined]


def _record(module: L.LightningModule) -> dict[str, Any] | None:
    try:
        return network_record(module, network_name(module))
    except ValueError:  # several networks, or none: a delta all the same, only `export` has to be told
        return None
