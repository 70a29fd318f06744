"""What Lightning restores too late, or not at all: a callback's own state, and the place of training loaders.

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
    return resumed_callback_states(trainer).get(state_key)


def resumed_callback_states(trainer: L.Trainer) -> dict[str, Any]:
    """The entries of all callbacks in that checkpoint, by their `state_key`; none when the run does not resume."""
    return _resumed(trainer)[0]


def resumed_weights(trainer: L.Trainer) -> frozenset[str]:
    """Names of the weights in that checkpoint; none when the run does not resume, or from a distributed checkpoint."""
    return _resumed(trainer)[1]


def _resumed(trainer: L.Trainer) -> tuple[dict[str, Any], frozenset[str]]:
    path, weights_only = _resumed_from(trainer)
    if path is None:
        return {}, frozenset()
    modified = Path(path).stat().st_mtime_ns if Path(path).exists() else 0
    return _read(str(path), modified, weights_only)


def _resumed_from(trainer: L.Trainer) -> tuple[Any, bool | None]:
    # Until it restores, Lightning keeps the path in the frame of `Trainer._run` alone: "last", "best" and "hpc" are
    # resolved there already, and `trainer.ckpt_path` is still None.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path"), frame.f_locals.get("weights_only")
        frame = frame.f_back  # type: ignore[assignment]
    return trainer.ckpt_path, None


def restore_loader_positions(trainer: L.Trainer) -> None:
    """Hands training loaders the place that a checkpoint has for them; call it from `on_train_start`.

    Where `configure_optimizers` asks for the number of steps, as every cosine schedule does, loaders are made before
    the loops are restored, and Lightning leaves their state behind: the epoch would begin anew. A second call changes
    nothing.
    """
    trainer.fit_loop._load_combined_loader_states()


@functools.lru_cache(maxsize=1)  # several callbacks ask for the same file
def _read(path: str, modified: int, weights_only: bool | None) -> tuple[dict[str, Any], frozenset[str]]:
    import torch
    from lightning.fabric.utilities.cloud_io import _load

    if Path(path).is_dir():  # a distributed checkpoint: everything that is not a shard stands in one file
        path = str(Path(path) / "meta.pt")
    if Path(path).is_file():
        # Memory-mapped: of a checkpoint of many gigabytes only the callbacks' few bytes are read.
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)
    else:
        loaded = _load(path, map_location="cpu", weights_only=weights_only)
    return loaded.get("callbacks", {}), frozenset(loaded.get("state_dict", ()))
