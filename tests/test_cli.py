"""The command line: what it lists, how it finds classes, and that `--ckpt_path last` goes on with the same run."""

from __future__ import annotations

import csv
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import docstring_parser
import lightning.pytorch as L
import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from lightning_peft import registry
from lightning_peft.callbacks import RandomState
from lightning_peft.cli import _gathered, main
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader

ROOT = Path(__file__).resolve().parent.parent


class Small(L.LightningModule):
    """A foreign module with dropout.

    Args:
        width: Width of its input.
        learning_rate: Step size of AdamW.
    """

    def __init__(self, width: int = 4, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch[0]) ** 2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.layers(batch[0]) ** 2).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Rows(L.LightningDataModule):
    """Twelve rows.

    Args:
        batch_size: Rows in a batch.
    """

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        rows = torch.arange(48, dtype=torch.float32).view(12, 4) / 48
        return LookAheadDataLoader(TensorDataset(rows), batch_size=self.batch_size, shuffle=True)

    val_dataloader = train_dataloader


class Die(L.Callback):
    """Ends the process at an optimizer step as a power cut would, or by an exception.

    Args:
        step: The step.
        kill: SIGKILL instead of an exception.
    """

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("stopped")


QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
THIS = "tests.test_cli"
MODEL = ["--model", f"{THIS}.Small", "--data", f"{THIS}.Rows", "--trainer.log_every_n_steps=1", *QUIET]
FIT = ["fit", *MODEL, "--trainer.max_epochs=2"]
EVERY_STEP = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
STOP = [f"--trainer.callbacks+={THIS}.Die", "--trainer.callbacks.step=4"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])


def run(*args: str):
    from lightning_peft.training_cli import FineTuningCLI

    return FineTuningCLI(list(args))


def weights(cli) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in cli.model.parameters()])


def metrics(version: str, root: str = ".") -> list[dict[str, str]]:
    with open(Path(root) / "lightning_logs" / version / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def training_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["train_loss"]]


def stderr_of_exit(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    return capsys.readouterr().err


# -- list -----------------------------------------------------------------------------------------------------------


def test_list_as_json_has_a_row_for_each_paper(capsys):
    main(["list", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["paper"] for row in rows] == list(range(1, 120))
    assert all(list(row) == ["paper", "title", "component", "kind", "path", "works"] for row in rows)
    assert rows[0]["path"] == "lightning_peft.objectives.concept_aware.ConceptAwareFineTuningMixin"
    unbuilt = next(row for row in rows if row["component"] is None)
    assert (unbuilt["kind"], unbuilt["path"], unbuilt["works"]) == (None, None, "not built yet")


def test_list_as_a_table_fits_columns_and_can_leave_out_what_is_not_built(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 120
    assert len({line.index(row.works) for line, row in zip(lines[1:], registry.TECHNIQUES)}) == 1
    main(["list", "--built"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + sum(bool(row.components) for row in registry.TECHNIQUES)


def test_the_page_of_techniques_is_current(capsys):
    main(["list", "--format", "markdown"])
    page = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out, "run: lightning-peft list --format markdown > docs/techniques.md"


def test_list_loads_nothing_heavy():
    code = "import sys; from lightning_peft.cli import main; main(['list']); main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(out.splitlines()[-1].split())


def test_an_unknown_command_is_named(capsys):
    assert "'fitt' is not a command" in stderr_of_exit(capsys, "fitt")


# -- classes and their help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", [c for _, c in registry.components()], ids=lambda c: c.name)
def test_every_component_has_help_for_every_argument_by_its_short_name(component, capsys):
    from lightning_peft.training_cli import FineTuningCLI

    option = {"callback": "trainer.callbacks", "datamodule": "data", "module": "model", "mixin": "model"}
    if component.kind not in option:
        pytest.skip(f"a {component.kind} is not named on the command line")
    name = component.ready.rpartition(".")[2] if component.ready else component.name
    with pytest.raises(SystemExit) as exit_:
        FineTuningCLI(["fit", f"--{option[component.kind]}.help", name])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    loaded = component.load()
    documented = {p.arg_name: p.description for p in docstring_parser.parse(loaded.__doc__).params}
    for argument in inspect.signature(loaded.__init__).parameters:
        if argument in ("self", "args", "kwargs"):
            continue
        assert f".{argument} " in shown or f".{argument}\n" in shown, f"{name} hides {argument}"
        first = documented[argument].split()[:3]
        assert " ".join(first) in " ".join(shown.split()), f"{argument} is shown without its description"


def test_print_config_is_a_config(capsys):
    with pytest.raises(SystemExit):
        run(*FIT, "--model.width", "6", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == {"class_path": f"{THIS}.Small", "init_args": {"width": 6, "learning_rate": 0.1}}
    assert printed["seed_everything"] == 0
    assert "optimizer" not in printed


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_random_state_is_kept_once():
    cli = run(*FIT, "--trainer.max_steps=1", "--trainer.callbacks+=RandomState")
    assert sum(isinstance(callback, RandomState) for callback in cli.trainer.callbacks) == 1
    cli = run(*FIT, "--trainer.max_steps=1")
    assert sum(isinstance(callback, RandomState) for callback in cli.trainer.callbacks) == 1


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=false"]], ids=["default logger", "no logger"])
def test_the_same_command_goes_on_where_it_stopped(logger):
    straight = run(*FIT, *EVERY_STEP, "--trainer.default_root_dir=straight", *logger)
    with pytest.raises(ArithmeticError):
        run(*FIT, *EVERY_STEP, *STOP, *logger)
    resumed = run(*FIT, *EVERY_STEP, *logger, "--ckpt_path", "last")
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    assert torch.equal(weights(resumed), weights(straight))
    if not logger:
        assert os.listdir("lightning_logs") == ["version_0"]
        kept = training_rows(metrics("version_0"))
        assert [int(row["step"]) for row in kept] == list(range(12))
        assert kept == training_rows(metrics("version_0", "straight"))
        config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
        assert config["ckpt_path"] == "last"


def test_a_killed_process_goes_on(tmp_path):
    command = [*FIT, *EVERY_STEP, *STOP, "--trainer.callbacks.kill=true"]
    code = f"from lightning_peft.cli import main; main({command!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = run(*FIT, *EVERY_STEP, "--ckpt_path", "last")
    straight = run(*FIT, *EVERY_STEP, "--trainer.default_root_dir=straight")
    assert torch.equal(weights(resumed), weights(straight))
    assert os.listdir("lightning_logs") == ["version_0"]


def test_last_is_the_newest_run_and_a_new_run_gets_a_new_folder():
    run(*FIT, "--trainer.max_epochs=1")
    run(*FIT, "--trainer.max_epochs=1")
    assert sorted(os.listdir("lightning_logs")) == ["version_0", "version_1"]
    resumed = run(*FIT, "--ckpt_path=last")
    assert resumed.trainer.global_step == 12
    assert sorted(os.listdir("lightning_logs")) == ["version_0", "version_1"]
    assert {len(metrics("version_0")), len(metrics("version_1"))} == {7, 14}  # a row a step, one an epoch


def test_a_checkpoint_by_path_goes_on_in_its_own_run():
    run(*FIT, "--trainer.max_epochs=1")
    run(*FIT, "--trainer.max_epochs=1")
    (first,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    run(*FIT, f"--ckpt_path={first}")
    assert sorted(os.listdir("lightning_logs")) == ["version_0", "version_1"]
    assert len(metrics("version_0")) == 14
    moved = first.rename("elsewhere.ckpt")
    run(*FIT, f"--ckpt_path={moved}")
    assert sorted(os.listdir("lightning_logs")) == ["version_0", "version_1", "version_2"]


def test_a_missing_checkpoint_is_an_error(capsys):
    message = stderr_of_exit(capsys, *FIT, "--ckpt_path", "last")
    assert "no run here has a checkpoint" in message
    message = stderr_of_exit(capsys, *FIT, "--ckpt_path", "nowhere.ckpt")
    assert "nowhere.ckpt: there is no such checkpoint" in message
    assert not Path("lightning_logs").exists()


def test_best_and_last_of_an_earlier_fit_can_be_evaluated(capsys):
    monitor = ["--trainer.callbacks.monitor=val_loss", "--trainer.callbacks.save_last=true"]
    fitted = run(*FIT, "--trainer.callbacks+=ModelCheckpoint", *monitor)
    best = fitted.trainer.checkpoint_callback
    evaluated = run("validate", *MODEL, "--ckpt_path=best")
    assert float(evaluated.trainer.callback_metrics["val_loss"]) == pytest.approx(float(best.best_model_score))
    assert not Path(best.best_model_path).samefile(best.last_model_path)
    assert yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["trainer"]["max_epochs"] == 2
    Path(best.best_model_path).unlink()
    assert "names no best checkpoint" in stderr_of_exit(capsys, "validate", *MODEL, "--ckpt_path=best")


def test_without_a_logger_the_users_own_config_stays():
    Path("config.yaml").write_text("# mine\ntrainer: {max_epochs: 1}\n")
    for _ in range(2):
        run(*FIT, "--config", "config.yaml", "--trainer.logger=false")
    assert Path("config.yaml").read_text().startswith("# mine")
    saved = yaml.safe_load(Path("checkpoints/config.yaml").read_text())
    assert saved["model"]["class_path"] == f"{THIS}.Small"


def test_the_command_wins_over_hyperparameters_in_the_checkpoint():
    run(*FIT, "--trainer.max_epochs=1")
    (path,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    resumed = run(*FIT, "--model.learning_rate=0.2", f"--ckpt_path={path}")
    assert resumed.model.learning_rate == 0.2


def test_classes_of_the_working_folder_are_found(tmp_path):
    (tmp_path / "my_own_models.py").write_text("from tests.test_cli import Small\n\n\nclass Mine(Small):\n    pass\n")
    cli = run("fit", "--model=my_own_models.Mine", "--data", f"{THIS}.Rows", *QUIET, "--trainer.max_steps=1")
    assert type(cli.model).__name__ == "Mine"
    sys.path.remove(str(tmp_path))


# -- merge and export -------------------------------------------------------------------------------------------------


def test_several_values_make_a_list():
    args = ["--base", "a", "--models", "b", "c", "--out", "d", "--models", '["e"]', "--models"]
    assert _gathered(args, {"models"}) == [
        *("--base", "a", "--models", '["b", "c"]', "--out", "d", "--models", '["e"]', "--models", "[]")
    ]
