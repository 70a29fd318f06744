"""A registry row as a run: the same tiny fit as subclass, YAML or drop-in, on one process or two."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
import yaml
from torch import Tensor

from lightning_peft.registry import Component, Example, components
from tests.conformance import foreign
from tests.conformance.data import TEXTS, Rows, image_rows
from tests.conformance.recorder import Recorder, weights_of
from tests.tiny import tiny_tokenizer

STEPS = 6  # optimizer steps of a run: two epochs of three
ROWS = 12  # rows of an optimizer step, over micro-batches and ranks

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")


@dataclass(frozen=True)
class Run:
    """One fit, as plain data: a killed child, the pair and the command line are handed the same.

    Args:
        path: The component, as in the registry.
        host: "own" (the module of the component's example) or the name of a foreign module.
        strategy: "one", "ddp" or "fsdp2" (both on two processes).
        precision: As for the Trainer.
        accumulate: Micro-batches of an optimizer step.
        optimizer: "sgd" or "adamw".
        dropout: Dropout of the network.
        folder: Where it writes.
        save: Write a checkpoint after every optimizer step.
        kill_at: The optimizer step whose backward kills the process.
        resume: A checkpoint to go on from ("last" for the command line).
        watch: See `Recorder`.
        twice: Add the component's second instance.
        trainer: Further arguments of the Trainer, as pairs.
    """

    path: str
    host: str = "own"
    strategy: str = "one"
    precision: str = "32-true"
    accumulate: int = 1
    optimizer: str = "sgd"
    dropout: float = 0.0
    folder: str = ""
    save: bool = False
    kill_at: int | None = None
    resume: str | None = None
    watch: bool = False
    twice: bool = False
    trainer: tuple[tuple[str, Any], ...] = ()

    @property
    def component(self) -> Component:
        return next(c for _, c in components() if c.path == self.path and c.example is not None)

    @property
    def example(self) -> Example:
        example = self.component.example
        assert example is not None, f"{self.path} has no example in the registry"
        return example

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch on a rank, so that a step has 12 in all."""
        return ROWS // self.accumulate // (1 if self.strategy == "one" else 2)

    def but(self, **changes: Any) -> Run:
        return replace(self, **changes)


class Fitted(NamedTuple):
    """A run that has ended, with what it was made of."""

    trainer: L.Trainer
    module: L.LightningModule
    data: L.LightningDataModule
    recorder: Recorder


@dataclass
class Result:
    """What a run left: weights by name before and after, the loss of each step, what moved unasked."""

    weights: dict[str, Tensor]
    before: dict[str, Tensor]
    losses: list[float]
    strayed: list[str] = field(default_factory=list)
    steps: int = 0


def classes(run: Run) -> dict[str, str]:
    """Class paths of what a run is made of."""
    component, example = run.component, run.example
    module = _class_path(example.module)
    if component.kind in ("mixin", "module"):
        module = component.ready or component.path
    if run.host != "own":
        module = f"{foreign.__name__}.{run.host}"
    data = component.path if component.kind == "datamodule" else f"{Rows.__module__}.Rows"
    return {"module": module, "data": data}


def _class_path(name: str) -> str:
    for package in ("models", "objectives"):
        module = importlib.import_module(f"lightning_peft.{package}")
        if name in module.__all__:
            made = getattr(module, name)
            return f"{made.__module__}.{made.__name__}"
    raise LookupError(f"no ready module is named {name!r}")


def load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def network_of(run: Run) -> torch.nn.Module:
    """The tiny network of the example's family, under the head that its module needs."""
    family, module = run.example.network, run.example.module
    if family == "bert" and module == "TextEncoder":
        return foreign.NETWORKS["bert"](dropout=run.dropout, head="BertModel")
    return foreign.NETWORKS[family](dropout=run.dropout)


@cache
def _network_folder(root: str, run: Run) -> str:
    folder = Path(root) / "networks" / f"{run.example.network}-{run.example.module}-{run.dropout}"
    if not (folder / "tokenizer.json").exists():
        network_of(run).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def network_folder(run: Run) -> str:
    """A folder that holds the network and its tokenizer, for what is named on the command line."""
    return _network_folder(os.environ["CONFORMANCE_TMP"], Run(run.path, dropout=run.dropout))


def module_arguments(run: Run) -> dict[str, Any]:
    """Arguments of the module but for the network."""
    if run.host != "own":
        return {"network": run.example.network, "dropout": run.dropout, "optimizer": run.optimizer}
    arguments = {
        "optimizer": run.optimizer,
        "learning_rate": 0.1 if run.optimizer == "sgd" else 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        **run.example.module_arguments,
    }
    return arguments | (dict(run.example.arguments) if run.component.kind in ("mixin", "module") else {})


def data_arguments(run: Run) -> dict[str, Any]:
    example = run.example
    if run.component.kind == "datamodule":
        given: dict[str, Any] = {"batch_size": run.batch_size}
        if example.data == "images":
            rows = {"data": image_rows(3 * ROWS), "validation": image_rows(6, 100), "test": image_rows(6, 200)}
            return {**example.arguments, **given, **rows}
        given["tokenizer"] = network_folder(run)
        if example.data in TEXTS:
            made = TEXTS[example.data]
            given |= {"data": made(3 * ROWS), "validation": made(6, 100), "test": made(6, 200)}
        return {**example.arguments, **given}
    plain = run.host != "own" and not run.save and run.resume is None
    kind = "tokens" if example.data in TEXTS else example.data
    return {"kind": kind, "batch_size": run.batch_size, "plain": plain}


def callbacks_under_test(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Class path and arguments of each callback under test; a layer comes in by `callbacks.PEFT`."""
    component, first = run.component, dict(run.example.arguments)
    path = component.path
    if component.kind == "layer":
        path = "lightning_peft.callbacks.peft.PEFT"
        first = {"config": {"peft_type": component.load()().peft_type.value, **first}}
    elif component.kind != "callback":
        return []
    return [(path, first)] + ([(path, dict(run.example.second or {}))] if run.twice else [])


def trainer_arguments(run: Run) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "precision": run.precision,
        "accumulate_grad_batches": run.accumulate,
        "max_epochs": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": run.save or run.path.endswith("Checkpoint"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": run.folder or os.environ["CONFORMANCE_TMP"],
        **dict(run.trainer),
    }


def python_module(run: Run) -> L.LightningModule:
    """The module as a subclass (mixins) or as it is."""
    component, paths = run.component, classes(run)
    if run.host != "own":
        return load(paths["module"])(**module_arguments(run))
    cls = load(paths["module"])
    if component.kind == "mixin":
        cls = type("Subclass", (component.load(), load(_class_path(run.example.module))), {})
    elif component.kind == "module":
        cls = type("Subclass", (cls,), {})
    return cls(network_of(run), tokenizer=tiny_tokenizer(), **module_arguments(run))


def strategy_of(run: Run) -> dict[str, Any]:
    if run.strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    if run.strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        made = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return {"devices": 2, "strategy": made}
    return {"devices": 1}


def build(run: Run, **trainer: Any) -> Fitted:
    """Everything a run needs, as a Python program would make it; nothing has run yet."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_peft.callbacks import RandomState

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = python_module(run)
    recorder = Recorder(run.kill_at, run.watch)
    callbacks: list[L.Callback] = [recorder]
    callbacks += [load(path)(**arguments) for path, arguments in callbacks_under_test(run)]
    callbacks += [] if run.path.endswith(".RandomState") else [RandomState()]  # the command line always has one
    if run.save:
        callbacks.append(ModelCheckpoint(run.folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True))
    options = {"logger": False, **trainer_arguments(run), **strategy_of(run)}
    options |= trainer
    made = L.Trainer(callbacks=callbacks + options.pop("callbacks", []), **options)
    data = load(classes(run)["data"])
    if run.component.kind == "datamodule":
        data = type("Subclass", (data,), {})
    return Fitted(made, module, data(**data_arguments(run)), recorder)


def fit(run: Run, **trainer: Any) -> Fitted:
    """The run as a Python program makes it."""
    made = build(run, **trainer)
    made.trainer.fit(made.module, made.data, ckpt_path=run.resume)
    return made


def config(run: Run) -> dict[str, Any]:
    """The run as a YAML for the command line, every callback's checkpoint and logger at its default."""
    paths = classes(run)
    arguments = module_arguments(run) | ({"model": network_folder(run)} if run.host == "own" else {})
    recorder = {"class_path": f"{Recorder.__module__}.Recorder"}
    recorder["init_args"] = {"kill_at": run.kill_at, "watch": run.watch}  # type: ignore[assignment]
    callbacks = [recorder]
    callbacks += [{"class_path": path, "init_args": given} for path, given in callbacks_under_test(run)]
    trainer = trainer_arguments(run) | {"devices": 1}
    if run.save:
        saving = {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
        callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving})
    else:
        trainer["logger"] = False
    return {
        "seed_everything": 0,
        "model": {"class_path": paths["module"], "init_args": arguments},
        "data": {"class_path": paths["data"], "init_args": data_arguments(run)},
        "trainer": {**trainer, "callbacks": callbacks},
        "ckpt_path": run.resume,
    }


def write_config(run: Run) -> Path:
    path = Path(run.folder) / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config(run), sort_keys=False))
    return path


def fit_by_yaml(run: Run) -> Fitted:
    """The run through the command line's class, in this process."""
    from lightning_peft.training_cli import FineTuningCLI

    torch.set_num_threads(1)
    cli = FineTuningCLI(args=["fit", "--config", str(write_config(run))])
    recorder = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder))
    return Fitted(cli.trainer, cli.model, cli.datamodule, recorder)


def summary(fitted: Fitted) -> Result:
    recorder = fitted.recorder
    steps = fitted.trainer.global_step
    return Result(weights_of(fitted.module), recorder.before, list(recorder.losses.values()), recorder.strayed, steps)


def result(run: Run) -> Result:
    """Fits and tells: what the pair and children call."""
    return summary(fit(run))


def result_by_yaml(run: Run) -> Result:
    return summary(fit_by_yaml(run))


@cache
def once(run: Run) -> Result:
    """The result of a run that several columns compare with."""
    return result(run)
