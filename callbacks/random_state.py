"""Random numbers that go on after a resume as if the run had never stopped. Lightning saves none (FINDINGS, 8)."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist

from lightning_peft.checkpoint import restore_loader_positions


def random_state() -> dict[str, Any]:
    """This process's generators (torch, CUDA, NumPy, Python) as tensors and JSON values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts this process's generators where `random_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    n = state["numpy"]
    np.random.set_state((n["name"], n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["cached"]))
    p = state["python"]
    random.setstate((p["version"], tuple(p["internal"].tolist()), p["gauss"]))


class RandomState(L.Callback):
    """Keeps every rank's random state in the checkpoint and restores it before the first resumed batch.

    One of these makes a killed and resumed run bit-equal to the one that was never stopped (dropout, sampled masks; the
    place in the data as well, where a schedule asks for the number of steps). What is drawn between two training
    batches, by validation or its loaders, leaves the numbers of training alone: a resumed run may not repeat it. The
    command line adds one by itself.

    Raises:
        ValueError: The checkpoint was written by another number of processes.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None
        self._held: dict[str, Any] | None = None  # after the last training batch

    def state_dict(self) -> dict[str, Any]:
        """Every rank's state. A collective call under distributed strategies, as saving a checkpoint is."""
        own = random_state() if self._held is None else self._held
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return {"ranks": gathered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._held = None
        restore_loader_positions(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: building the network, loaders and the sanity check all draw numbers (FINDINGS, 8).
        if self._loaded is not None:
            states, self._loaded = self._loaded, None
            if len(states) != trainer.world_size:
                raise ValueError(
                    f"the checkpoint holds the random state of {len(states)} processes and this run has "
                    f"{trainer.world_size}: resume with as many, or remove the RandomState callback to go on with new "
                    "random numbers."
                )
            set_random_state(states[trainer.global_rank])
        elif self._held is not None:
            set_random_state(self._held)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._held = random_state()
