"""Optimizers and schedules by name and by class path, and what decays."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.models import CausalLM
from tests.models.test_causal_lm import batch_of, quiet_trainer, rows
from tests.tiny import tiny_llama


def fitted(tmp_path, steps: int = 4, **arguments) -> tuple[CausalLM, list[float]]:
    """The module after a few steps, and the learning rate of each."""
    rates: list[float] = []

    class Rates(CausalLM):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = Rates(tiny_llama(hidden=64), learning_rate=0.1, **arguments)
    loader = LookAheadDataLoader(rows(20), batch_size=2, shuffle=False, collate_fn=batch_of)
    quiet_trainer(tmp_path, max_steps=steps).fit(module, loader)
    return module, rates


def test_eight_bit_adamw_holds_its_state_in_eight_bits(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    before = tiny_llama(hidden=64).state_dict()
    module, _ = fitted(tmp_path, optimizer="adamw_8bit", lr_scheduler="constant")
    optimizer = module.optimizers().optimizer
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before)
    large = [state for p, state in optimizer.state.items() if p.numel() >= 4096]  # smaller ones stay in 32 bits
    assert large
    assert all(state["state1"].dtype is torch.uint8 for state in large)


def test_class_paths(tmp_path):
    module, rates = fitted(
        tmp_path,
        optimizer="torch.optim.RMSprop",
        optimizer_args={"momentum": 0.5},
        lr_scheduler="torch.optim.lr_scheduler.StepLR",
        lr_scheduler_args={"step_size": 2, "gamma": 0.5},
    )
    assert type(module.optimizers().optimizer) is torch.optim.RMSprop
    assert module.optimizers().optimizer.defaults["momentum"] == 0.5
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.5 * (1 + math.cos(math.pi * 2 / 3))), ("linear", 1 / 3)])
def test_defaults_warm_up_and_fall(name, last, tmp_path):
    """Over 4 steps, one of warm-up (a quarter): 0, 1, and then down to 0 behind the last."""
    module, rates = fitted(tmp_path, lr_scheduler=name, warmup_steps=0.25)
    assert type(module.optimizers().optimizer) is torch.optim.AdamW
    assert rates[:2] == pytest.approx([0, 0.1])
    assert rates[3] == pytest.approx(0.1 * last)


def test_matrices_decay_and_nothing_else():
    module = CausalLM(tiny_llama(), weight_decay=0.1)
    decayed, free = module.parameter_groups()
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.parameters()))


def test_what_cannot_be_imported_is_named():
    with pytest.raises(ValueError, match=r"optimizer='torch.optim.Adamm' cannot be imported"):
        CausalLM(tiny_llama(), optimizer="torch.optim.Adamm")
