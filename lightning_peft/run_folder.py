"""Where a run of the command line keeps its checkpoints, and how a later command finds and continues it.

Lightning looks for `last` in the folder of the *new* run, so with the default logger (a fresh `version_N` each time) it
finds nothing and starts from step 0 (FINDINGS, 14).
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, TypeGuard

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


def _unversioned(logger: Logger) -> TypeGuard[CSVLogger | TensorBoardLogger]:
    """Whether the logger takes the next free `version_N` by itself."""
    return isinstance(logger, (CSVLogger, TensorBoardLogger)) and logger._version is None


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Every folder in which this trainer's checkpoint callbacks would have written, earlier versions included."""
    folders: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath:
            folders.append(Path(callback.dirpath))
        elif not trainer.loggers:
            folders.append(Path(trainer.default_root_dir) / "checkpoints")
        elif _unversioned(trainer.loggers[0]):
            root = Path(str(trainer.loggers[0].root_dir))
            versions = [path for path in root.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]
            folders += [path / "checkpoints" for path in sorted(versions, key=lambda p: int(p.name[8:]))]
        else:
            logger = trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            base = logger.save_dir if logger.save_dir is not None else trainer.default_root_dir
            folders.append(Path(base) / str(logger.name) / version / "checkpoints")
    return list(dict.fromkeys(folders))


def _whole(path: Path) -> bool:
    """A file (Lightning renames it when it is whole), or a distributed checkpoint whose last part was written."""
    return path.is_file() or (path / "meta.pt").is_file()


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The checkpoint that was written last, over all of `checkpoint_folders`; `None` if there is none."""
    found = [path for folder in checkpoint_folders(trainer) for path in folder.glob("*.ckpt") if _whole(path)]
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name.startswith("last")), default=None)


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint's content without reading its tensors into memory."""
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def best_checkpoint(path: Path) -> Path | None:
    """The best checkpoint of the run that wrote `path`, by its `ModelCheckpoint(monitor=...)`."""
    for key, state in _load(path).get("callbacks", {}).items():
        if key.startswith("ModelCheckpoint") and state.get("monitor") and state.get("best_model_path"):
            best = Path(state["best_model_path"])
            # The folder may have moved since.
            for candidate in (best, path.parent / best.name):
                if _whole(candidate):
                    return candidate
    return None


def continue_version(trainer: L.Trainer, checkpoint: Path) -> bool:
    """Points the trainer's loggers at the run that wrote `checkpoint`; whether that run's folder is gone on with.

    Rows of `metrics.csv` from before the checkpoint are kept: on its own CSVLogger deletes the file.
    """
    if not trainer.loggers:
        return True
    first = trainer.loggers[0]
    run = checkpoint.resolve().parent.parent
    if _unversioned(first):
        version = re.fullmatch(r"version_(\d+)", run.name)
        root = Path(str(first.root_dir)).resolve()
        if version is None or run.parent != root:
            return False  # a checkpoint from elsewhere: this is a new run that starts from it
        for logger in trainer.loggers:
            if _unversioned(logger):
                logger._version = int(version[1])
    elif Path(getattr(first, "log_dir", None) or run).resolve() != run:
        return False
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            _keep_rows(logger, before=int(_load(checkpoint)["global_step"]))
    return True


def _keep_rows(logger: CSVLogger, before: int) -> None:
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
    experiment = logger.experiment  # creating it deletes the file
    experiment.metrics.extend({**row, "step": int(row["step"])} for row in rows if int(row["step"]) < before)
    experiment.save()
