"""InstructionData under CausalLM: packing, accumulation and kills change nothing that they should not."""

import os
import signal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.callbacks import RandomState
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.models import CausalLM
from tests.processes import call_in_child
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

ROWS = [
    {"prompt": f"{word} ", "completion": " ".join("abcdefghijkl"[: 1 + 5 * n % 12]), "weight": 1.0 + n % 3}
    for n, word in enumerate("abcdefghijklmnop")
]
UNWEIGHTED = [{key: row[key] for key in ("prompt", "completion")} for row in ROWS]


class Killed(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, network, data, callbacks=(), ckpt_path=None, **kwargs):
    torch.manual_seed(3)
    module = CausalLM(network, tokenizer=tiny_tokenizer(), optimizer="sgd", learning_rate=0.5, lr_scheduler="constant")
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("rows", [UNWEIGHTED, ROWS], ids=["plain", "weighted"])
def test_a_step_on_packed_rows_is_the_step_on_the_same_rows_apart(rows, build, attention, tmp_path):
    apart = InstructionData(rows, batch_size=16)
    packed = InstructionData(rows, batch_size=16, packing=True, max_length=20)
    weights = [
        fit(tmp_path, build(attn_implementation=attention), data, max_steps=1, accumulate_grad_batches=accumulate)
        for data, accumulate in ((apart, 1), (packed, 1), (InstructionData(rows, batch_size=4), 4))
    ]
    start = list(build().parameters())
    assert max((a - b).abs().max() for a, b in zip(weights[0], start)) > 1e-3
    for a, b, c in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-6, rtol=0)


def _child(folder, kill_at, ckpt_path, workers):
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    data = InstructionData(UNWEIGHTED, batch_size=1, packing=True, max_length=20, num_workers=workers)
    callbacks = [RandomState(), saving, *([] if kill_at is None else [Killed(kill_at)])]
    weights = fit(folder, tiny_gpt2(dropout=0.3), data, callbacks, ckpt_path, max_epochs=2, accumulate_grad_batches=2)
    return [weight.numpy() for weight in weights]


@pytest.mark.parametrize(("kill_at", "workers"), [(1, 0), (3, 0), (4, 2), (5, 0)])
def test_killed_in_packed_data_and_resumed_is_bit_equal(kill_at, workers, tmp_path):
    code, whole = call_in_child(_child, tmp_path / "whole", None, None, workers)
    assert code is None
    code, _ = call_in_child(_child, tmp_path / "killed", kill_at, None, workers)
    assert code == -signal.SIGKILL
    code, resumed = call_in_child(_child, tmp_path / "killed", None, tmp_path / "killed" / "last.ckpt", workers)
    assert code is None
    assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))
