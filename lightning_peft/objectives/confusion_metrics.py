"""Metrics of a confusion matrix that are no mean over examples, their values and their slopes.

C [K, K] is normalised so that each row sums to 1 / K; recall_i = C_ii / sum_j C_ij, coverage_j = sum_i C_ij. The slopes
are those of Selective Mixup (ICLR 2024, section 4 and appendix) with respect to logits A, C = softmax(A) / K by row:

    dC_ij / dA_il = C_ij 1[l = j] - K C_il C_ij,   so   dM / dA = C * (D - K rowsum(D * C)),   D = dM / dC
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

#: Entries of C are at least this, so that a class at recall 0 has a slope.
LEAST = 1e-7


def normalised_confusion(counts: Tensor) -> Tensor:
    """C [K, K] in float64 from counts [K, K] of how often class i (row) was taken for class j.

    Raises:
        ValueError: A class has no example.
    """
    counts = counts.double()
    total = counts.sum(1, keepdim=True)
    if (total == 0).any():
        raise ValueError(
            f"the classes {(total.squeeze(1) == 0).nonzero().flatten().tolist()} have no validation example, so "
            "nothing is known of their recall: give a validation set with every class, or leave such classes out."
        )
    return (counts / (total * len(counts))).clamp(min=LEAST)


def recalls(confusion: Tensor) -> Tensor:
    """C_ii / sum_j C_ij [K]."""
    return confusion.diagonal() / confusion.sum(1)


def head_classes(classes: int) -> int:
    """How many classes are the head: the first 9 of 10. Class 0 is to be the most frequent, the last the rarest."""
    return max(int(0.9 * classes), 1)


# Of recalls [K]; NaN stands for a class without examples.


def mean_recall(recall: Tensor) -> Tensor:
    """(1 / K) sum_i recall_i."""
    return recall.nanmean()


def min_recall(recall: Tensor) -> Tensor:
    """The worst class's recall."""
    return recall.nan_to_num(nan=torch.inf).min()


def geometric_mean(recall: Tensor) -> Tensor:
    """(prod_i recall_i)^(1 / K)."""
    return recall.log().nanmean().exp()


def harmonic_mean(recall: Tensor) -> Tensor:
    """K / sum_i (1 / recall_i)."""
    return 1 / (1 / recall).nanmean()


def min_head_tail_recall(recall: Tensor) -> Tensor:
    """The lower of the mean recalls of the first 9 of 10 classes and of the rest."""
    head = head_classes(len(recall))
    return min_recall(torch.stack([recall[:head].nanmean(), recall[head:].nanmean()]))


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_recall": mean_recall,
    "min_recall": min_recall,
    "geometric_mean": geometric_mean,
    "harmonic_mean": harmonic_mean,
    "min_head_tail_recall": min_head_tail_recall,
}
#: Constraints on coverage: of every class, or of the means over head and tail.
COVERAGES = ("class", "head_tail")


def class_weights(name: str, confusion: Tensor, previous: Tensor, memory: float, rate: float) -> Tensor:
    """lambda [K] of the minima, which are linear programs: lambda_i prop. to lambda_i^memory exp(-rate recall_i).

    Args:
        name: "min_recall", or "min_head_tail_recall", which weights its two groups by their mean recall.
        confusion: C.
        previous: lambda of the last time.
        memory: beta; at 0 the past does not count, as in every published configuration.
        rate: The larger, the more the worst counts.
    """
    recall = recalls(confusion)
    if name == "min_recall":
        return (memory * previous.log() - rate * recall).softmax(0)
    head = head_classes(len(confusion))
    two = (-rate * torch.stack([recall[:head].mean(), recall[head:].mean()])).softmax(0)
    return torch.cat([two[:1].expand(head) / head, two[1:].expand(len(recall) - head) / max(len(recall) - head, 1)])


def coverage_multipliers(kind: str, confusion: Tensor, share: float, softness: float, largest: float) -> Tensor:
    """lambda_j [K] of the constraint coverage_j >= share / K.

        lambda_j = max(largest (1 - exp((coverage_j - share / K) / softness)), 0)

    Args:
        kind: "class", or "head_tail" for the mean coverages of the two groups.
        confusion: C.
        share: alpha.
        softness: tau.
        largest: Lambda.
    """
    coverage, head = confusion.sum(0), head_classes(len(confusion))
    if kind == "head_tail":
        coverage = torch.stack([coverage[:head].mean(), coverage[head:].mean()])
    multipliers = (largest * (1 - ((coverage - share / len(confusion)) / softness).exp())).clamp(min=0)
    if kind == "class":
        return multipliers
    tail = len(confusion) - head
    return torch.cat([multipliers[:1].expand(head) / head, multipliers[1:].expand(tail) / max(tail, 1)])


def slope(name: str, confusion: Tensor, weights: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """dM / dA [K, K], the rate at which the metric rises with the logit of class l on examples of class i.

    Args:
        name: One of `VALUES`.
        confusion: C.
        weights: lambda of the minima, [K].
        multipliers: lambda of the coverage constraint, [K]; their term is added and all divided by the largest plus 1.
    """
    classes, diagonal, total = len(confusion), confusion.diagonal(), confusion.sum(1)
    if name == "mean_recall":
        d = torch.eye(classes).to(confusion)  # M = sum_i C_ii
    elif name in ("min_recall", "min_head_tail_recall"):
        assert weights is not None
        d = torch.diag(weights * classes)  # M = sum_i lambda_i K C_ii
    elif name == "geometric_mean":  # (GM / K) (1[i = j] / C_ii - 1 / rowsum_i)
        d = geometric_mean(recalls(confusion)) / classes * (torch.diag(1 / diagonal) - (1 / total)[:, None])
    else:  # -(HM^2 / K) (1 / C_ii - 1[i = j] rowsum_i / C_ii^2)
        d = (
            harmonic_mean(recalls(confusion)) ** 2
            / classes
            * (torch.diag(total / diagonal**2) - (1 / diagonal)[:, None])
        )
    if multipliers is not None:
        d = (d + multipliers) / (multipliers.max() + 1)  # d coverage_j / dC_ij = 1
    return confusion * (d - classes * (d * confusion).sum(1, keepdim=True))


class ConfusionMetric(Metric):
    """A metric of the confusion matrix, exact over batches and ranks. Recalls of classes without examples are left out.

    Args:
        num_classes: K.
        name: "mean_recall", "min_recall", "geometric_mean", "harmonic_mean", "min_head_tail_recall", or "min_coverage",
            the least share of predictions that a class gets, times K.

    Raises:
        ValueError: `name` is not known.
    """

    higher_is_better = True

    def __init__(self, num_classes: int, name: str) -> None:
        super().__init__()
        if name not in VALUES and name != "min_coverage":
            raise ValueError(f"name={name!r} is not known: use one of {[*VALUES, 'min_coverage']}.")
        self.num_classes, self.name = num_classes, name
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Adds predicted classes [n] and true classes [n]."""
        self.confusion += confusion_counts(predicted, labels, self.num_classes)

    def compute(self) -> Tensor:
        counts: Any = self.confusion
        rows = counts / counts.sum(1, keepdim=True)  # NaN without examples
        if self.name == "min_coverage":
            return rows.nanmean(0).min() * self.num_classes
        return VALUES[self.name](rows.diagonal())


def confusion_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often class i (row) was taken for class j, [K, K]."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
