"""`lightning-peft fit|validate|test|predict`: LightningCLI that knows our classes by name and can continue a run."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_peft.run_folder import best_checkpoint, checkpoint_folders, continue_version, newest_checkpoint

PACKAGES = ("models", "objectives", "callbacks", "datamodules")


def import_components() -> None:
    """Imports every public class: jsonargparse knows a class by its short name only once it is imported."""
    for package in PACKAGES:
        module = importlib.import_module(f"lightning_peft.{package}")
        for name in module.__all__:
            getattr(module, name)


class SaveRunConfig(SaveConfigCallback):
    """Writes the run's whole configuration beside its logs, or beside its checkpoints where there is no logger.

    Resuming overwrites it; a new run refuses to.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers and isinstance(trainer.loggers[0], (CSVLogger, TensorBoardLogger)):
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a logger `log_dir` is the working folder, where the user's own config.yaml may lie, so the file goes
        # beside the checkpoints; their folder is known only after every callback's setup.
        callback = trainer.checkpoint_callback
        if self.already_saved or callback is None or not getattr(callback, "dirpath", None):
            return
        if trainer.is_global_zero:
            folder = Path(callback.dirpath)  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / self.config_filename)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class FineTuningCLI(LightningCLI):
    """LightningCLI over any LightningModule, callback and DataModule, ours by short name.

    `--ckpt_path last` goes on with the newest checkpoint of the run, in the run's own folder; the checkpoint and every
    random generator are the run's (a `RandomState` callback is always there). Arguments of this command win over
    hyperparameters in a checkpoint.

    Args:
        args: Command line without the program's name; by default that of the process.
        **kwargs: Arguments of LightningCLI.
    """

    def __init__(self, args: list[str] | None = None, **kwargs: Any) -> None:
        import_components()
        if os.getcwd() not in sys.path:  # a console script, unlike `python main.py`, does not see the user's modules
            sys.path.append(os.getcwd())
        defaults: dict[str, Any] = {
            "save_config_callback": SaveRunConfig,
            "save_config_kwargs": {},
            # A run can be repeated unless it is told otherwise.
            "seed_everything_default": 0,
            # LightningCLI would make the optimizer before callbacks add or choose weights; modules name their own.
            "auto_configure_optimizers": False,
            "parser_kwargs": {"prog": "lightning-peft"},
        }
        super().__init__(args=args, **{**defaults, **kwargs})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        from lightning_peft import __version__

        kwargs["dump_header"] = [f"lightning.pytorch=={L.__version__}", f"lightning_peft=={__version__}"]
        return super().init_parser(**kwargs)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would let a checkpoint's hyperparameters override this command line; here the command wins.
        if not self.config.get("subcommand"):
            return
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and str(path) not in ("last", "best", "hpc") and ":" not in str(path) and not Path(path).exists():
            self.parser.error(
                f"--ckpt_path {path}: there is no such checkpoint. Give the path of one, 'last' for the newest of the "
                "run, or leave it out to start anew."
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        from lightning_peft.callbacks import RandomState

        given = self._get(self.config_init, "trainer").get("callbacks") or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        if not any(isinstance(callback, RandomState) for callback in callbacks):
            callbacks.append(RandomState())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        asked = str(kwargs.get("ckpt_path"))
        if asked in ("last", "best"):
            kwargs["ckpt_path"] = str(self._resolve(asked))
        if subcommand == "fit" and kwargs.get("ckpt_path") and asked != "hpc":
            self._continue(Path(kwargs["ckpt_path"]))
        return kwargs

    def _resolve(self, asked: str) -> Path:
        path = newest_checkpoint(self.trainer)
        if path is None:
            folders = ", ".join(map(str, checkpoint_folders(self.trainer))) or self.trainer.default_root_dir
            self.parser.error(
                f"--ckpt_path {asked}: no run here has a checkpoint (looked in: {folders}). Leave --ckpt_path out to "
                "start anew, or give the path of a checkpoint."
            )
        if asked == "last":
            return path
        best = best_checkpoint(path)
        if best is None:
            self.parser.error(
                f"--ckpt_path best: the run of {path} names no best checkpoint that is still there. Give its path, or "
                "'last'."
            )
        return best

    def _continue(self, checkpoint: Path) -> None:
        """Lets the resumed fit write into the folder of the run that `checkpoint` belongs to."""
        if not checkpoint.exists():
            return  # a remote one: Lightning reads it, and its run's folder is not ours to write to
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")  # the rows are put back
            continued = continue_version(self.trainer, checkpoint)
        if continued:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SaveRunConfig):
                    callback.overwrite = True
