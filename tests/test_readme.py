"""What the README says works: its commands and its code run as they stand there, on a tiny network."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.cli import main
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolLM2-135M"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


class Plain(L.LightningModule):
    """Plain Lightning around a tiny network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama(layers=3)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


@pytest.fixture(autouse=True)
def network(tmp_path, monkeypatch) -> str:
    """An empty working folder with a tiny network, in place of the one on the hub, and some rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    tiny_llama(layers=3).save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    rows = [{"prompt": "the cat ", "completion": "sat on mat"}, {"prompt": "one two ", "completion": "three four"}] * 4
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "tiny")


def test_each_way_of_use_takes_at_most_ten_lines():
    for block in [*blocks("console"), *blocks("python")]:
        assert len(block.splitlines()) <= 10


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_runs(command, network):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    assert command[0] == "lightning-peft"
    args = [network if arg == HUB else arg for arg in command[1:]]
    args = [str(ROOT / arg) if arg.startswith("examples/") else arg for arg in args]
    short = ["--model.model", network, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main([*args, *short, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"])


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[-1])
def test_code_runs(block, network):
    data = DataLoader(TensorDataset(torch.randint(5, 128, (4, 8))), batch_size=2)
    names = {"your_module": Plain(), "your_other_module": Plain(), "your_data": data, "__name__": "readme"}
    exec(compile(block.replace(HUB, network), "README.md", "exec"), names)
    if "module" in names:
        assert names["module"].objectives


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
