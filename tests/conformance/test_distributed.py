"""Two processes, under DDP and FSDP2, train what one process trains on the union of their rows."""

from __future__ import annotations

import pytest

from tests.conformance.compare import assert_same
from tests.conformance.runs import Run, once, result
from tests.conformance.table import full, techniques, variants

#: FINDINGS 20: weights with SGD, loss and weights with AdamW.
TOLERANCES = {"ddp": {"sgd": 1e-6, "adamw": 1e-4}, "fsdp2": {"sgd": 1e-5, "adamw": 1e-4}}


def check(pair, run: Run) -> None:
    one = once(run.but(strategy="one", accumulate=1))
    first, second = pair.run(result, run)
    assert_same(second.weights, first.weights, 0.0, "rank 1 against rank 0")
    what = f"{run.strategy}, {run.accumulate} micro-batches, against one process"
    assert_same(first.weights, one.weights, TOLERANCES[run.strategy][run.optimizer], what)
    losses = [(a + b) / 2 for a, b in zip(first.losses, second.losses, strict=True)]  # a rank's is scaled by the ranks
    assert losses == pytest.approx(one.losses, abs=1e-5), what


@techniques("ddp")
@variants("optimizer", "sgd", "adamw")
@variants("accumulate", 3, 1)
def test_ddp(technique, optimizer, accumulate, pair):
    accumulate = 1 if "accumulation" in technique.not_applicable else accumulate
    check(pair, Run(technique.path, strategy="ddp", optimizer=optimizer, accumulate=accumulate))


@techniques("fsdp2")
@variants("optimizer", "sgd", "adamw")
@variants("accumulate", 1, 3)
def test_fsdp2(technique, optimizer, accumulate, pair):
    accumulate = 1 if "accumulation" in technique.not_applicable else accumulate
    check(pair, Run(technique.path, strategy="fsdp2", optimizer=optimizer, accumulate=accumulate))


@pytest.mark.skipif(not full(), reason="the full product")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@techniques("ddp", "fsdp2", "bf16-mixed", "bf16-true")
def test_lower_precision(technique, precision, strategy, pair):
    first, second = pair.run(result, Run(technique.path, strategy=strategy, precision=precision))
    assert_same(second.weights, first.weights, 0.0, "rank 1 against rank 0")
    exact = once(Run(technique.path))
    both = [(a + b) / 2 for a, b in zip(first.losses, second.losses)]
    assert both == pytest.approx(exact.losses, rel=0.03, abs=0.03)
