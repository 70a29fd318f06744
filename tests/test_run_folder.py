"""Finding a run's checkpoints and going on in its folder."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.run_folder import best_checkpoint, checkpoint_folders, continue_version, newest_checkpoint


def trainer(root: Path, *callbacks: L.Callback, logger=True) -> L.Trainer:
    return L.Trainer(default_root_dir=root, callbacks=list(callbacks), logger=logger, accelerator="cpu")


def written(path: Path, at: int, content: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content or {"global_step": 0}, path)
    os.utime(path, ns=(at, at))
    return path


def test_newest_by_time_over_all_versions(tmp_path):
    versions = tmp_path / "lightning_logs"
    written(versions / "version_0" / "checkpoints" / "a.ckpt", at=10)
    newest = written(versions / "version_2" / "checkpoints" / "b.ckpt", at=30)
    written(versions / "version_10" / "checkpoints" / "c.ckpt", at=20)
    written(versions / "version_10" / "elsewhere.ckpt", at=90)
    assert newest_checkpoint(trainer(tmp_path)) == newest
    folders = [folder.parent.name for folder in checkpoint_folders(trainer(tmp_path))]
    assert folders == ["version_0", "version_2", "version_10"]


def test_equal_times_prefer_last(tmp_path):
    folder = tmp_path / "checkpoints"
    written(folder / "z.ckpt", at=10)
    last = written(folder / "last.ckpt", at=10)
    assert newest_checkpoint(trainer(tmp_path, logger=False)) == last


def test_a_distributed_checkpoint_counts_once_it_is_whole(tmp_path):
    folder = tmp_path / "checkpoints"
    old = written(folder / "old.ckpt", at=10)
    (folder / "new.ckpt").mkdir()
    assert newest_checkpoint(trainer(tmp_path, logger=False)) == old
    (folder / "new.ckpt" / "meta.pt").touch()
    assert newest_checkpoint(trainer(tmp_path, logger=False)) == folder / "new.ckpt"


def test_folders_of_callbacks_and_of_loggers_with_a_version(tmp_path):
    own = trainer(tmp_path, ModelCheckpoint(tmp_path / "mine"), ModelCheckpoint(monitor="x"), logger=False)
    assert checkpoint_folders(own) == [tmp_path / "mine", tmp_path / "checkpoints"]
    logger = CSVLogger(tmp_path, name="runs", version="a")
    assert checkpoint_folders(trainer(tmp_path, logger=logger)) == [tmp_path / "runs" / "a" / "checkpoints"]
    without = L.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, accelerator="cpu")
    assert newest_checkpoint(without) is None


def test_best_is_found_after_the_folder_moved(tmp_path):
    best = written(tmp_path / "best.ckpt", at=1)
    state = {"monitor": "val_loss", "best_model_path": "/gone/best.ckpt"}
    last = written(tmp_path / "last.ckpt", at=2, content={"callbacks": {"ModelCheckpoint{...}": state}})
    assert best_checkpoint(last) == best
    best.unlink()
    assert best_checkpoint(last) is None
    unmonitored = {"monitor": None, "best_model_path": str(last)}
    assert best_checkpoint(written(last, at=3, content={"callbacks": {"ModelCheckpoint": unmonitored}})) is None


@pytest.mark.parametrize("explicit", [False, True])
def test_rows_of_the_log_from_after_the_checkpoint_go(tmp_path, explicit):
    run = tmp_path / "lightning_logs" / "version_3"
    path = written(run / "checkpoints" / "x.ckpt", at=1, content={"global_step": 2})
    rows = [("step", "a", "b"), ("0", "1.5", ""), ("1", "2.5", ""), ("1", "", "7"), ("2", "3.5", ""), ("3", "4.5", "")]
    (run / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    own = trainer(tmp_path, logger=CSVLogger(tmp_path, version=3) if explicit else CSVLogger(tmp_path))
    assert continue_version(own, path)
    assert own.logger.version == 3
    with (run / "metrics.csv").open() as file:
        kept = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert kept == [{"step": "0", "a": "1.5"}, {"step": "1", "a": "2.5"}, {"step": "1", "b": "7"}]


def test_a_checkpoint_from_elsewhere_starts_a_new_version(tmp_path):
    path = written(tmp_path / "copied.ckpt", at=1)
    own = trainer(tmp_path)
    assert not continue_version(own, path)
    assert own.logger.version == 0
