"""d90: the bisection on known curves, and on a real task."""

from __future__ import annotations

import pytest

from lightning_peft.callbacks import IntrinsicDimension
from lightning_peft.search.intrinsic_dimension import d90
from tests.callbacks.test_half_finetuning import causal, fit
from tests.tiny import tiny_llama


@pytest.mark.parametrize("true", [10, 11, 57, 1000, 99_999])
def test_it_finds_where_a_curve_crosses(true):
    tried = []

    def curve(d: int) -> float:
        tried.append(d)
        return 0.95 if d >= true else 0.5

    found = d90(curve, full=1.0)
    assert true <= found.d <= 1.2 * true + 1
    assert found.wanted == pytest.approx(0.9)
    assert len(tried) == len(set(tried)) <= 10
    assert [d for d, _ in found.curve] == sorted(tried)


def test_exactly_if_asked():
    assert d90(lambda d: float(d >= 57), full=1.0, tolerance=1 + 1e-9).d == 57


def test_another_share():
    assert d90(lambda d: d / 1000, full=1.0, share=0.5, high=1000, tolerance=1.01).d == pytest.approx(500, rel=0.02)


def test_on_a_network(tmp_path):
    """How far the loss falls on rows seen again and again, of what 4,000 numbers do."""
    start = 4.85

    def fall(d: int) -> float:
        trainer = fit(causal(tiny_llama()), IntrinsicDimension(d, seed=1), max_steps=20)
        return start - float(trainer.callback_metrics["train_loss"])

    found = d90(fall, full=fall(4000), low=25, high=4000, share=0.5, tolerance=2)
    assert 25 < found.d < 4000
    assert found.draw(tmp_path / "d90.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0}, "low=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"full": 0.0}, "full=0.0"),
        ({"full": 9.0}, "d=100000 gives 1 and 8.1 is wanted: raise high"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        d90(lambda d: 1.0, **{"full": 1.0, **arguments})
    with pytest.raises(ValueError, match="finite"):
        d90(lambda d: float("nan"), full=1.0)
