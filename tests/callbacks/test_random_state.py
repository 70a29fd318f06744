"""Random numbers go on after a resume as if the run had never stopped."""

from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.callbacks.random_state import RandomState, random_state, set_random_state
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader


def test_every_generator_goes_back():
    state = random_state()
    drawn = [torch.rand(3), np.random.randn(3), random.random(), random.gauss(0, 1)]
    torch.rand(5), np.random.randn(1), random.gauss(0, 1)
    set_random_state(state)
    again = [torch.rand(3), np.random.randn(3), random.random(), random.gauss(0, 1)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, again))


class Noisy(L.LightningModule):
    """Uses all three generators in every step: the loss follows them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return (torch.dropout(self.layer(batch), 0.5, True) * noise).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(path, stop: int, resume: str | None = None, callbacks: tuple = ()) -> list[torch.Tensor]:
    module = Noisy()
    trainer = L.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        max_steps=stop,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1, filename="{step}"), *callbacks],
    )
    data = torch.arange(48, dtype=torch.float32).view(12, 4)
    trainer.fit(module, LookAheadDataLoader(data, batch_size=2, shuffle=True), ckpt_path=resume)
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("stop", [3, 6, 7])  # in mid-epoch, at an epoch's end (6 batches), just after one
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    L.seed_everything(5)
    whole = fit(tmp_path / "whole", 10, callbacks=(RandomState(),))
    L.seed_everything(5)
    fit(tmp_path / "killed", stop, callbacks=(RandomState(),))
    L.seed_everything(99)  # another process starts from other numbers
    resumed = fit(tmp_path / "resumed", 10, str(tmp_path / "killed" / f"step={stop}.ckpt"), (RandomState(),))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_without_it_the_resumed_run_differs(tmp_path):
    L.seed_everything(5)
    whole = fit(tmp_path / "whole", 8)
    L.seed_everything(99)
    resumed = fit(tmp_path / "resumed", 8, str(tmp_path / "whole" / "step=3.ckpt"))
    assert not all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_another_number_of_processes_is_refused(tmp_path):
    L.seed_everything(5)
    fit(tmp_path, 2, callbacks=(RandomState(),))
    path = tmp_path / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["RandomState"]["ranks"] *= 2
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="2 processes and this run has 1"):
        fit(tmp_path / "more", 4, str(path), (RandomState(),))
