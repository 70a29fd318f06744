"""Metrics of confusion matrices and their slopes, against autograd through C(A), scipy and hand formulas."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from lightning_peft.objectives.confusion_metrics import (
    COVERAGES,
    LEAST,
    VALUES,
    ConfusionMetric,
    class_weights,
    coverage_multipliers,
    head_classes,
    normalised_confusion,
    recalls,
    slope,
)

K = 12


def logits(k: int = K, seed: int = 0) -> torch.Tensor:
    a = torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + 2 * torch.eye(k, dtype=torch.float64)


def confusion_of(a: torch.Tensor) -> torch.Tensor:
    return a.softmax(1) / len(a)


def value(name: str, c: torch.Tensor, weights: torch.Tensor | None, multipliers: torch.Tensor | None) -> torch.Tensor:
    """What `slope` says it is the slope of: minima with their weights held, coverage with its multipliers held."""
    recall = c.diagonal() / c.sum(1)
    if name in ("min_recall", "min_head_tail_recall"):
        m = (weights * recall).sum()
    else:
        m = {
            "mean_recall": recall.mean(),
            "geometric_mean": recall.prod() ** (1 / len(c)),
            "harmonic_mean": len(c) / (1 / recall).sum(),
        }[name]
    return m if multipliers is None else (m + (multipliers * c.sum(0)).sum()) / (multipliers.max() + 1)


@pytest.mark.parametrize("coverage", [None, *COVERAGES])
@pytest.mark.parametrize("name", sorted(VALUES))
def test_slopes_are_autograds_through_the_logits(name, coverage):
    a = logits().requires_grad_()
    c = confusion_of(a)
    fixed = c.detach()
    weights = class_weights(name, fixed, torch.full((K,), 1 / K).double(), 0.0, 5.0) if "min" in name else None
    multipliers = coverage and coverage_multipliers(coverage, fixed, 1.3, 0.05, 10.0)
    (expected,) = torch.autograd.grad(value(name, c, weights, multipliers), a)
    torch.testing.assert_close(slope(name, fixed, weights, multipliers), expected)


def test_the_papers_closed_form_of_mean_recall():
    c = confusion_of(logits(4))
    expected = torch.empty_like(c)
    for i in range(4):
        for j in range(4):
            expected[i, j] = c[i, i] - 4 * c[i, i] ** 2 if i == j else -4 * c[i, j] * c[i, i]
    torch.testing.assert_close(slope("mean_recall", c), expected)


def test_values_by_scipy():
    recall = recalls(confusion_of(logits()))
    made = {name: float(function(recall)) for name, function in VALUES.items()}
    r = recall.numpy()
    assert made["mean_recall"] == pytest.approx(r.mean())
    assert made["min_recall"] == pytest.approx(r.min())
    assert made["geometric_mean"] == pytest.approx(stats.gmean(r))
    assert made["harmonic_mean"] == pytest.approx(stats.hmean(r))
    assert head_classes(K) == 10
    assert made["min_head_tail_recall"] == pytest.approx(min(r[:10].mean(), r[10:].mean()))


def test_weights_of_the_minima():
    c = confusion_of(logits(4))
    recall, previous = recalls(c), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    for memory in (0.0, 0.5):
        expected = previous**memory * torch.exp(-50 * recall)
        made = class_weights("min_recall", c, previous, memory, 50.0)
        torch.testing.assert_close(made, expected / expected.sum())
    wide = recalls(confusion_of(logits()))
    head, tail = (torch.exp(-7 * wide[part].mean()) for part in (slice(0, 10), slice(10, 12)))
    made = class_weights("min_head_tail_recall", confusion_of(logits()), wide, 0.0, 7.0)
    torch.testing.assert_close(made[0], head / (head + tail) / 10)
    torch.testing.assert_close(made[-1], tail / (head + tail) / 2)
    assert float(made.sum()) == pytest.approx(1)


def test_multipliers_act_on_classes_that_are_predicted_too_rarely():
    c = torch.tensor([[0.4, 0.1], [0.3, 0.2]]).double()  # coverages 0.7 and 0.3, wanted 0.45
    made = coverage_multipliers("class", c, 0.9, 0.5, 10.0)
    assert float(made[0]) == 0
    assert float(made[1]) == pytest.approx(10 * (1 - 2.718281828459045 ** ((0.3 - 0.45) / 0.5)))


def test_a_class_without_an_example_is_an_error_and_recall_0_has_a_slope():
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 1]])
    with pytest.raises(ValueError, match=r"classes \[1\] have no validation example"):
        normalised_confusion(counts)
    c = normalised_confusion(torch.tensor([[3, 1, 0], [0, 0, 5], [2, 2, 1]]))
    torch.testing.assert_close(c.sum(1), torch.full((3,), 1 / 3).double(), atol=1e-6, rtol=0)
    assert float(c[1, 1]) == LEAST
    for name in ("geometric_mean", "harmonic_mean"):
        assert float(slope(name, c)[1].abs().max()) > 0


@pytest.mark.parametrize("name", [*VALUES, "min_coverage"])
def test_metric_over_batches_is_that_of_all(name):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (60,), generator=generator)
    predicted = torch.where(torch.rand(60, generator=generator) < 0.6, labels, torch.randint(0, 4, (60,)))
    metric = ConfusionMetric(5, name)  # class 4 is never seen, and never predicted
    for part in range(0, 60, 7):
        metric.update(predicted[part : part + 7], labels[part : part + 7])
    recall = torch.tensor([float((predicted[labels == c] == c).float().mean()) for c in range(4)])
    shares = torch.stack([(predicted[labels == c, None] == torch.arange(5)).float().mean(0) for c in range(4)])
    expected = {
        "mean_recall": recall.mean(),
        "min_recall": recall.min(),
        "geometric_mean": recall.prod() ** 0.25,
        "harmonic_mean": 4 / (1 / recall).sum(),
        "min_head_tail_recall": recall.mean(),  # of the tail nothing is known
        "min_coverage": 5 * shares.mean(0).min(),
    }[name]
    torch.testing.assert_close(metric.compute(), expected)


def test_unknown_names():
    with pytest.raises(ValueError, match="name='accuracy' is not known"):
        ConfusionMetric(3, "accuracy")
