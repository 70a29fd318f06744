"""Every way to use a technique gives the same weights; every precision trains; only what should train has moved."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lightning_peft.callbacks import PEFT
from lightning_peft.registry import components
from tests.conformance.compare import assert_same, moved
from tests.conformance.runs import STEPS, Run, fit, once, result, result_by_yaml, summary
from tests.conformance.table import TESTED, full, techniques, with_way


@pytest.mark.parametrize("component", [c for _, c in components() if c.kind in TESTED], ids=lambda c: c.name)
def test_every_component_takes_part(component):
    assert component.example is not None, (
        f"{component.path} is registered without an Example, so the conformance suite cannot run it: give its row one."
    )


@techniques("subclass", kinds=with_way("subclass"))
def test_subclass(technique):
    made = once(Run(technique.path))
    assert made.steps == STEPS
    assert moved(made.before, made.weights), "six steps changed no weight"


@techniques("yaml", kinds=with_way("yaml"))
def test_yaml(technique, tmp_path):
    made = result_by_yaml(Run(technique.path, folder=str(tmp_path)))
    assert_same(made.weights, once(Run(technique.path)).weights, 0.0, "YAML against Python")


@techniques("drop-in", kinds=with_way("drop-in"))
def test_drop_in(technique):
    """On a plain LightningModule; `test_foreign.py` has the other kinds."""
    made = result(Run(technique.path, host="BuiltInInit"))
    assert made.steps == STEPS
    assert moved(made.before, made.weights), "six steps changed no weight"


@techniques("fp32")
def test_fp32(technique):
    """Runs that are alike are equal to the bit."""
    assert_same(result(Run(technique.path)).weights, once(Run(technique.path)).weights, 0.0, "run twice")


@techniques("bf16-mixed")
def test_bf16_mixed(technique):
    made, exact = result(Run(technique.path, precision="bf16-mixed")), once(Run(technique.path))
    _close(made.losses, exact.losses)
    assert {v.dtype for v in made.weights.values() if v.is_floating_point()} == {torch.float32}


@techniques("bf16-true")
def test_bf16_true(technique):
    made, exact = result(Run(technique.path, precision="bf16-true")), once(Run(technique.path))
    _close(made.losses, exact.losses)
    assert moved(made.before, made.weights), "six steps changed no weight"
    dtypes = {name: v.dtype for name, v in made.weights.items() if v.is_floating_point()}
    adapter = technique.example.trains if adds_weights(technique) else "lora_"  # PEFT holds adapters in fp32
    wide = {name for name, dtype in dtypes.items() if dtype is torch.float32 and not re.search(adapter, name)}
    assert not wide, f"float32 in a bf16-true run: {sorted(wide)[:3]}"


def adds_weights(technique) -> bool:
    """Whether what trains is an adapter's."""
    return technique.kind == "layer" or (technique.kind == "callback" and issubclass(technique.load(), PEFT))


def _close(losses: list[float], exact: list[float]) -> None:
    """bf16 has 8 bits: the first loss is near, and the course is the same."""
    assert len(losses) == len(exact)
    assert all(math.isfinite(loss) for loss in losses)
    for made, expected in zip(losses, exact):
        assert made == pytest.approx(expected, rel=0.03, abs=0.03)


@techniques("accumulation")
def test_accumulation(technique):
    """Three micro-batches of 4 rows are one batch of 12 (FINDINGS, 20)."""
    made, large = result(Run(technique.path, accumulate=3)), once(Run(technique.path))
    assert made.steps == large.steps
    assert_same(made.weights, large.weights, 1e-6, "accumulation of 3 against the large batch")


@techniques("frozen")
def test_frozen(technique):
    """Nothing moved that no optimizer held, nor anything that the registry does not name; something moved."""
    # The precise run and, where the second half of a technique begins later, every step of it.
    fitted = fit(Run(technique.path, watch=True, optimizer="adamw"))
    made = summary(fitted)
    assert not made.strayed, f"changed without being in an optimizer: {made.strayed[:3]}"
    changed = moved(made.before, made.weights)
    assert changed, "nothing trained"
    named = technique.example.trains
    stray = {name for name in changed if not re.search(named, name)}
    assert not stray, f"{sorted(stray)[:3]} moved, and only names with {named!r} may"


@pytest.mark.skipif(not full(), reason="the full product")
@techniques("bf16-mixed", "accumulation")
def test_bf16_mixed_accumulation(technique):
    made = result(Run(technique.path, precision="bf16-mixed", accumulate=3))
    assert made.steps == STEPS
    assert all(math.isfinite(loss) for loss in made.losses)
