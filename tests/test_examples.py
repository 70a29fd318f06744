"""Every example runs: each YAML through the command line and each script's `main`, on a tiny network and few steps."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_bert, tiny_llama, tiny_mixtral, tiny_tokenizer, tiny_vit

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SHORT = [
    "--trainer.max_steps=4",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    """A folder with a tiny network and its tokenizer, by the class of transformers that reads it."""
    made = {
        "AutoModelForCausalLM": tiny_llama(layers=3, hidden=64),  # 4-bit blocks hold 64
        "a mixture of experts": tiny_mixtral(layers=3, hidden=64),
        "AutoModelForSequenceClassification": tiny_bert(),
        "AutoModel": tiny_bert(head="BertModel"),
        "AutoModelForImageClassification": tiny_vit(image_size=224, patch_size=56, num_channels=3),
    }
    folders = {}
    for name, network in made.items():
        folder = tmp_path_factory.mktemp(name)
        network.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])


def test_there_are_examples():
    assert {"quickstart.yaml", "subclass.py", "config.py", "drop_in.py"} <= {p.name for p in (*CONFIGS, *SCRIPTS)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_runs(path, networks):
    from jsonargparse._util import import_object

    from lightning_peft.training_cli import FineTuningCLI

    if "load_in_4bit" in path.read_text():
        pytest.importorskip("bitsandbytes")
    class_path = yaml.safe_load(path.read_text())["model"]["class_path"]
    network = networks[import_object(class_path).auto_class]
    if "ExpertSpecialized" in path.read_text():
        network = networks["a mixture of experts"]
    cli = FineTuningCLI(["fit", "--config", str(path), "--model.model", network, *SHORT])
    assert cli.trainer.global_step > 0
    assert math.isfinite(float(cli.trainer.callback_metrics["train_loss"]))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_runs(path, networks, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    accepted = inspect.signature(script.main).parameters
    offered = {"model": networks["AutoModelForCausalLM"], "max_steps": 4, "out": str(tmp_path / "out")}
    assert "max_steps" in accepted, f"{path.name}: main(max_steps=...) lets this test shorten it"
    script.main(**{name: value for name, value in offered.items() if name in accepted})
