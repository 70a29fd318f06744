"""Several techniques in one run, killed and resumed: what one keeps does not disturb another."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_peft.callbacks import PEFT, ConceptAblation, HalfFineTuning, RandomState, TransPEFT
from lightning_peft.models import CausalLM
from lightning_peft.objectives import ConceptAwareFineTuningMixin
from tests.conformance.data import Rows
from tests.processes import call_in_child
from tests.tiny import tiny_llama

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
STEPS = 6  # two epochs of three
LORA = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}


class Kill(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class HalfConceptAware(ConceptAwareFineTuningMixin, CausalLM):
    """Half of the trunk trains on the losses of auxiliary heads."""


def adapted() -> tuple[L.LightningModule, list[L.Callback]]:
    """An adapter that leans neither on exact neurons nor on a concept, averaged over the run."""
    ablation = ConceptAblation("random", layers=[0], components=2)
    module = CausalLM(tiny_llama(dropout=0.1), learning_rate=0.01, warmup_steps=2)
    return module, [PEFT(LORA), TransPEFT(0.2, 0.2), ablation, EMAWeightAveraging(decay=0.8)]


def halved() -> tuple[L.LightningModule, list[L.Callback]]:
    heads: dict[str, Any] = {"predicted_tokens": 3, "heads_init": "copy", "finetune_heads": True}
    module = HalfConceptAware(tiny_llama(dropout=0.1), learning_rate=0.01, warmup_steps=2, **heads)
    return module, [HalfFineTuning(reselect="epoch", train_embeddings=False)]


RUNS = {"PEFT + TransPEFT + ConceptAblation + EMA": adapted, "HalfFineTuning + ConceptAwareFineTuningMixin": halved}


def fit(name: str, folder: str, kill_at: int | None = None, resume: str | None = None) -> L.LightningModule:
    torch.set_num_threads(1)
    L.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed process draws other numbers of its own
    module, callbacks = RUNS[name]()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks += [RandomState(), saving, *([] if kill_at is None else [Kill(kill_at)])]
    trainer = L.Trainer(max_steps=STEPS, callbacks=callbacks, **QUIET)
    trainer.fit(module, Rows("tokens", batch_size=12), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: fit(name, str(folder / str(n))).state_dict() for n, name in enumerate(RUNS)}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [2, 3, 4])  # within an epoch, at its end, after the move that begins the next
def test_killed_and_resumed_is_bit_equal(name, step, whole, tmp_path):
    code, _ = call_in_child(fit, name, str(tmp_path), step)
    assert code == -signal.SIGKILL
    resumed = fit(name, str(tmp_path / "resumed"), resume=str(Path(tmp_path) / f"step={step}.ckpt"))
    assert resumed.state_dict().keys() == whole[name].keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, whole[name][key]), key


def test_each_has_its_effect(whole, tmp_path, monkeypatch):
    """Without any one of them the run ends elsewhere."""
    name = next(iter(RUNS))
    for left_out in (1, 2, 3):

        def fewer(left_out: int = left_out) -> tuple[L.LightningModule, list[L.Callback]]:
            module, callbacks = adapted()
            return module, [callback for i, callback in enumerate(callbacks) if i != left_out]

        monkeypatch.setitem(RUNS, name, fewer)
        made = fit(name, str(tmp_path / str(left_out))).state_dict()
        assert any(not torch.equal(value, whole[name][key]) for key, value in made.items()), left_out


def test_half_of_the_trunk_moves_under_all_heads(whole):
    """As many matrices stay as without heads, and the heads' losses move the others."""
    torch.manual_seed(3)
    module, _ = halved()
    before, after = module.state_dict(), whole["HalfFineTuning + ConceptAwareFineTuningMixin"]
    blocks = [key for key in before if ".layers." in key and key.startswith("model.") and "norm" not in key]
    moved = {key for key in blocks if not torch.equal(before[key], after[key])}
    # Two rounds of half: between a half and all of the fourteen matrices.
    assert 7 <= len(moved) < 14
    assert all(torch.equal(before[key], after[key]) for key in before if "embed_tokens" in key)
