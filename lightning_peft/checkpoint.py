"""A callback's own state, read before Lightning restores it.

What trains has to be known before optimizers are made, and under `ModelParallelStrategy` they are made before anything
is restored (FINDINGS, 2).
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as L


def resumed_callback_state(trainer: L.Trainer, state_key: str) -> dict[str, Any] | None:
    """The entry of `state_key` in the checkpoint that this `fit` resumes from; call it from `setup`.

    Args:
        trainer: The trainer whose `fit` is being set up.
        state_key: The callback's `state_key`.

    Returns:
        The callback's `state_dict`, or None when the run does not resume or the checkpoint has no such callback.
    """
    path, weights_only = _resumed_from(trainer)
    if path is None:
        return None
    modified = Path(path).stat().st_mtime_ns if Path(path).exists() else 0
    return _callback_states(str(path), modified, weights_only).get(state_key)


def _resumed_from(trainer: L.Trainer) -> tuple[Any, bool | None]:
    # Until it restores, Lightning keeps the path in the frame of `Trainer._run` alone: "last", "best" and "hpc" are
    # resolved there already, and `trainer.ckpt_path` is still None.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path"), frame.f_locals.get("weights_only")
        frame = frame.f_back  # type: ignore[assignment]
    return trainer.ckpt_path, None


@functools.lru_cache(maxsize=1)  # several callbacks ask for the same file
def _callback_states(path: str, modified: int, weights_only: bool | None) -> dict[str, Any]:
    import torch
    from lightning.fabric.utilities.cloud_io import _load

    if Path(path).is_dir():  # a distributed checkpoint: everything that is not a shard stands in one file
        path = str(Path(path) / "meta.pt")
    if Path(path).is_file():
        # Memory-mapped: of a checkpoint of many gigabytes only the callbacks' few bytes are read.
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)
    else:
        loaded = _load(path, map_location="cpu", weights_only=weights_only)
    return loaded.get("callbacks", {})
