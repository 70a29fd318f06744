"""Callbacks on LightningModules that know nothing of ours, two of a class, and what they leave behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.conformance import foreign
from tests.conformance.compare import assert_same, moved
from tests.conformance.data import Rows
from tests.conformance.runs import (
    STEPS,
    Run,
    callbacks_under_test,
    fit,
    load,
    once,
    result,
    summary,
    trainer_arguments,
)
from tests.conformance.table import full, techniques, variants, why_not

AUTOMATIC = [kind.__name__ for kind in foreign.KINDS if kind is not foreign.Manual]


def traces(module: nn.Module) -> dict[str, Any]:
    """What a callback could leave on a module: attributes and hooks of every part, what requires a gradient, keys."""
    found: dict[str, Any] = {"keys": sorted(module.state_dict())}
    for name, part in module.named_modules():
        hooks = {key: len(value) for key, value in vars(part).items() if key.endswith("hooks") and value}
        found[f"{name}: attributes"] = sorted(vars(part))
        found[f"{name}: hooks"] = hooks
        found[f"{name}: class"] = type(part).__name__
    found["requires_grad"] = sorted(name for name, p in module.named_parameters() if p.requires_grad)
    return found


@cache
def clean(host: str, network: str, data: str) -> dict[str, Any]:
    """The traces that Lightning itself leaves on a foreign module."""
    arguments = trainer_arguments(Run("", host)) | {"logger": False, "enable_checkpointing": False}
    module = load(f"{foreign.__name__}.{host}")(network=network)
    L.Trainer(**arguments).fit(module, Rows(data, plain=True))
    return traces(module)


def check_left(technique, run: Run, module: nn.Module) -> None:
    if technique.kind == "layer" or why_not(technique, "teardown"):  # a layer stays, as the adapter of `callbacks.PEFT`
        return
    expected = clean(run.host, run.example.network, "tokens" if run.example.data == "text" else run.example.data)
    left = traces(module)
    apart = [key for key in left.keys() | expected.keys() if left.get(key) != expected.get(key)]
    told = "; ".join(f"{key} is {left.get(key)}, without the callback {expected.get(key)}" for key in sorted(apart)[:3])
    assert not apart, f"left behind on {run.host}: {told}"


@pytest.mark.parametrize("host", AUTOMATIC)
@techniques("drop-in", kinds=("callback", "layer"))
def test_foreign(technique, host):
    run = Run(technique.path, host=host)
    fitted = fit(run)
    made = summary(fitted)
    assert made.steps == STEPS
    assert moved(made.before, made.weights), "six steps changed no weight"
    check_left(technique, run, fitted.module)


@techniques("drop-in", "manual", kinds=("callback", "layer"))
def test_manual(technique):
    run = Run(technique.path, host="Manual")
    fitted = fit(run)
    made = summary(fitted)
    assert moved(made.before, made.weights), "six steps changed no weight"
    check_left(technique, run, fitted.module)


@techniques("drop-in", kinds=("callback",))
def test_manual_is_refused_by_name(technique):
    """Where manual optimisation does not apply, the callback says so instead of doing nothing."""
    if not why_not(technique, "manual"):
        pytest.skip("it works under manual optimisation")
    with pytest.raises((ValueError, MisconfigurationException)) as refused:
        fit(Run(technique.path, host="Manual"))
    assert technique.name in str(refused.value)
    assert "manual" in str(refused.value)


@techniques("drop-in", "ddp", kinds=("callback", "layer"))
@variants("host", "FilterWithWarmup", "BuiltInInit", "BuiltInConfigureModel", "TwoGroups")
def test_foreign_ddp(technique, host, pair):
    compare_on_two(technique, host, "ddp", 1e-6, pair)


@techniques("drop-in", "fsdp2", kinds=("callback", "layer"))
@variants("host", "BuiltInConfigureModel", "BuiltInInit", "FilterWithWarmup", "TwoGroups")
def test_foreign_fsdp2(technique, host, pair):
    compare_on_two(technique, host, "fsdp2", 1e-5, pair)


def compare_on_two(technique, host: str, strategy: str, atol: float, pair) -> None:
    run = Run(technique.path, host=host, strategy=strategy)
    first, second = pair.run(result, run)
    assert_same(second.weights, first.weights, 0.0, "rank 1 against rank 0")
    assert_same(first.weights, once(run.but(strategy="one")).weights, atol, f"{strategy} against one process")


@techniques("two", kinds=("callback", "layer"))
def test_two_of_a_class(technique, tmp_path):
    """Two with other arguments live in one run, each with its own place in the checkpoint."""
    example = technique.example
    assert example.second is not None, "give the example a second callback's arguments, or the reason under 'two'"
    run = Run(technique.path, twice=True, save=True, folder=str(tmp_path))
    keys = {load(path)(**arguments).state_key for path, arguments in callbacks_under_test(run)}
    assert len(keys) == 2, f"both have the state_key {keys.pop()!r}: make it from the arguments"
    assert result(run).steps == STEPS


@techniques("teardown", kinds=("callback",))
def test_teardown(technique):
    """On the module of its example: after fit nothing of the callback is left there."""
    run = Run(technique.path)
    with_it = traces(fit(run).module)
    without = traces(_without_callback(run))
    apart = sorted(key for key in with_it.keys() | without.keys() if with_it.get(key) != without.get(key))
    told = "; ".join(f"{key} is {with_it.get(key)}, without {without.get(key)}" for key in apart[:3])
    assert not apart, f"left behind: {told}"


def _without_callback(run: Run) -> nn.Module:
    from tests.conformance.runs import build

    made = build(run)
    made.trainer.callbacks = [c for c in made.trainer.callbacks if type(c) is not run.component.load()]
    made.trainer.fit(made.module, made.data)
    return made.module


@pytest.mark.skipif(not full(), reason="the full product")
@pytest.mark.parametrize("host", AUTOMATIC)
@techniques("drop-in", "bf16-mixed", kinds=("callback", "layer"))
def test_foreign_bf16_mixed(technique, host):
    made = result(Run(technique.path, host=host, precision="bf16-mixed", accumulate=3))
    assert moved(made.before, made.weights)
