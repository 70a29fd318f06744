"""Mixup of the class pairs that raise a metric of the confusion matrix most (SelMix, ICLR 2024, arXiv 2403.18301).

Of a row x1 of class i and a row x2 of class j the features are mixed, z = l f(x1) + (1 - l) f(x2) with l ~
U(lambda_min, 1), and the head learns class i from them. Which pairs: with C the confusion matrix on validation data,
z_k the class means of its features and M the metric, the gain of mixing i with j is M's change to first order in a step
of the head on the mix,

    z_ij = lbar z_i + (1 - lbar) z_j,   p_ij = softmax(head(z_ij)),   lbar = (1 + lambda_min) / 2
    LCR[i, j, q, l] = (1[l = i] - p_ij[l]) z_ij . z_q        (the logit of class l on class q)
    G_ij = sum_{q, l} dM/dA[q, l] LCR[i, j, q, l],           P_ij prop. to softmax(G / T)_ij 1[G_ij > 0]

and every 50 steps P is made anew. Training stops when the largest gain has settled. It is meant to follow a first
training (the paper's: FixMatch with logit adjustment), with plain SGD and a small rate, the encoder's a tenth of the
head's (`head_learning_rate`).

Where the published code (val-iisc/SelMix) does something else: the first term of LCR there reads z_i . z_q
(`selmix_reproduce_repository`); its sampler adds 1 / K^3 to every P_ij (`selmix_smoothing`); C is normalised over all
entries, the same where validation is balanced; a class at recall 0 makes every gain of the geometric and harmonic mean
0; momentum stands in its configurations and is never passed on; batch norms use the batch's statistics, and here their
running ones (frozen); unlabelled rows are paired by their true classes, and here by what the network takes them for at
each refresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.models.image_classifier import ImageClassifier
from lightning_peft.models.sequence_classifier import IGNORED
from lightning_peft.models.token_metrics import metric_of
from lightning_peft.network_modes import evaluation_mode
from lightning_peft.objectives.confusion_metrics import (
    COVERAGES,
    VALUES,
    ConfusionMetric,
    class_weights,
    confusion_counts,
    coverage_multipliers,
    normalised_confusion,
    slope,
)
from lightning_peft.objectives.objective import Objective

if TYPE_CHECKING:
    from lightning_peft.models.fine_tuning_module import FineTuningModule, StepTerms
    from lightning_peft.objectives.objective import Batch


def pair_gains(
    prototypes: Tensor, logits: Tensor, metric_slope: Tensor, coefficient: float, reproduce_repository: bool = False
) -> Tensor:
    """G [K, K] in O(K^3), without ever holding LCR.

    The head is affine, so the logits of a mix are the mix of logits, and with B = Z Z^T dM/dA, B[i, l] = sum_q
    (z_i . z_q) dM/dA[q, l], the sums over q and l fall apart:

        G_ij = b_ij[i] - sum_l p_ij[l] b_ij[l],   b_ij = lbar B[i] + (1 - lbar) B[j]

    Args:
        prototypes: Class means of the features, [K, D].
        logits: The head's logits of them, [K, K].
        metric_slope: dM/dA [K, K].
        coefficient: lbar.
        reproduce_repository: b_ii[i] in place of b_ij[i].
    """
    b, classes = prototypes @ prototypes.T @ metric_slope, len(prototypes)
    gains = []
    for i in torch.arange(classes).split(max(2**22 // classes**2, 1)):  # about 30 MB at once
        b_ij, logits_ij = (coefficient * m[i, None] + (1 - coefficient) * m[None] for m in (b, logits))  # [i, j, l]
        own = b[i, None] if reproduce_repository else b_ij
        own = own.gather(2, i[:, None, None].expand(-1, own.shape[1], 1)).squeeze(2)
        gains.append(own - (logits_ij.softmax(-1) * b_ij).sum(-1))
    return torch.cat(gains)


def pair_distribution(gains: Tensor, temperature: float, smoothing: float = 0.0) -> Tensor:
    """P [K, K]: softmax over all pairs of G / T, those that lose left out; uniform if all do.

    Args:
        gains: G [K, K].
        temperature: T.
        smoothing: Added to every P_ij before they are normalised; the published sampler's is 1 / K^3.
    """
    kept = (gains / temperature).flatten().softmax(0).view_as(gains) * (gains > 0) + 1e-8
    kept = kept / kept.sum() + smoothing
    return kept / kept.sum()


class SelectiveMixup(Objective):
    """Features of pairs of classes mixed, the pairs chosen by their gain in a metric.

    Needs a training loader with a `ClassPairSampler` and `ClassPairs` (`ImageData(class_pairs=True)`) and validation
    data with every class, which is read whole at each refresh. Logged from validation: every metric by its name.

    Args:
        selmix_metric: "mean_recall", "min_recall", "geometric_mean", "harmonic_mean" or "min_head_tail_recall" (of the
            first 9 of 10 classes and of the rest, class 0 being the most frequent).
        selmix_coverage: Constrain how often each "class" is predicted, or the means of "head_tail".
        selmix_temperature: T; the larger, the more pairs take part.
        selmix_every: Optimizer steps from one P to the next.
        selmix_minimum: lambda_min, in [0.5, 1].
        selmix_smoothing: Added to every P_ij.
        selmix_stop: Stop when the largest gain lies within this fraction of the mean of the last 10; None goes on.
        selmix_rate: For the minima: the larger, the more the worst class (or group) counts.
        selmix_memory: beta, for "min_recall": how much of the last weights of classes is kept, in the exponent.
        selmix_share: alpha, the part of 1 / K that each class's predictions are to reach.
        selmix_softness: tau of that constraint.
        selmix_largest: Lambda, its largest multiplier.
        selmix_reproduce_repository: The positive part of the logit's change as in the published code.

    Raises:
        ValueError: An argument is out of range, the module is no `ImageClassifier`, or data without pairs or classes.
    """

    def __init__(
        self,
        selmix_metric: str = "min_recall",
        selmix_coverage: str | None = None,
        selmix_temperature: float = 0.1,
        selmix_every: int = 50,
        selmix_minimum: float = 0.6,
        selmix_smoothing: float = 0.0,
        selmix_stop: float | None = 0.05,
        selmix_rate: float = 50.0,
        selmix_memory: float = 0.0,
        selmix_share: float = 0.95,
        selmix_softness: float = 0.01,
        selmix_largest: float = 100.0,
        selmix_reproduce_repository: bool = False,
    ) -> None:
        if selmix_metric not in VALUES:
            raise ValueError(f"selmix_metric={selmix_metric!r} is not known: use one of {sorted(VALUES)}.")
        if selmix_coverage is not None and selmix_coverage not in COVERAGES:
            raise ValueError(f"selmix_coverage={selmix_coverage!r} is not known: use one of {COVERAGES}, or None.")
        if not 0.5 <= selmix_minimum <= 1:
            raise ValueError(f"selmix_minimum={selmix_minimum} must be in [0.5, 1]: the first row's label is learnt.")
        for name, value in {
            "temperature": selmix_temperature,
            "every": selmix_every,
            "softness": selmix_softness,
        }.items():
            if not value > 0:
                raise ValueError(f"selmix_{name}={value} must be above 0.")
        self.metric, self.coverage = selmix_metric, selmix_coverage
        self.temperature, self.every, self.minimum = selmix_temperature, selmix_every, selmix_minimum
        self.smoothing, self.stop, self.rate, self.memory = selmix_smoothing, selmix_stop, selmix_rate, selmix_memory
        self.constraint = (selmix_share, selmix_softness, selmix_largest)
        self.reproduce_repository = selmix_reproduce_repository
        self.distribution: Tensor | None = None  # P
        self.weights: Tensor | None = None  # lambda of the minima
        self.gains: list[float] = []  # the largest of each refresh
        self.refreshed: int | None = None  # step of the last one
        self.pseudo_labels: Tensor | None = None

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, ImageClassifier):
            raise ValueError(
                f"SelectiveMixup mixes the features of an ImageClassifier, and {type(module).__name__} is none: use "
                "SelectiveMixupImageClassifier, or the mixin with ImageClassifier."
            )
        module.freeze_batch_norms()

    # -- the step -------------------------------------------------------------------------------------------------

    def transform_batch(self, module: FineTuningModule, batch: Batch) -> Batch:
        if "partner_pixel_values" not in batch:
            return batch
        batch = dict(batch)
        partners = batch.pop("partner_pixel_values")
        batch["pixel_values"] = torch.cat([batch["pixel_values"], partners])
        batch["labels"] = torch.cat([batch["labels"], torch.full_like(batch["labels"], IGNORED)])
        if "weight" in batch:
            batch["weight"] = torch.cat([batch["weight"], torch.zeros_like(batch["weight"])])
        return batch

    def before_head(self, module: FineTuningModule, batch: Batch, hidden: Tensor) -> Tensor:
        if "mixup" not in batch:
            raise ValueError(
                "a training batch has no pairs to mix: use ImageData(class_pairs=True), or a loader over ClassPairs "
                "with a ClassPairSampler."
            )
        first, second = hidden.chunk(2)
        part = batch["mixup"].to(hidden)[:, None]
        return torch.cat([part * first + (1 - part) * second, second])  # z = l f(x1) + (1 - l) f(x2)

    # -- P --------------------------------------------------------------------------------------------------------

    def on_train_start(self, module: FineTuningModule) -> None:
        if self.refreshed is not None and self.refreshed > module.global_step:
            self.refreshed = None  # a new run
        self._hand_over(module)
        self._refresh_if_due(module)

    def on_step_end(self, module: FineTuningModule) -> None:
        self._refresh_if_due(module)

    def _refresh_if_due(self, module: FineTuningModule) -> None:
        # Also right after a resume: a checkpoint of the very step is written before the step's refresh.
        if self.refreshed is None or module.global_step // self.every > self.refreshed // self.every:
            self.refresh(module)

    def refresh(self, module: Any) -> None:
        """P from the whole validation set, the same on every rank; with it new classes of unlabelled partners."""
        counts, prototypes, logits = class_statistics(module, _validation_batches(module.trainer))
        confusion = normalised_confusion(counts)
        if self.metric in ("min_recall", "min_head_tail_recall"):
            previous = torch.full((len(confusion),), 1 / len(confusion)).double()
            previous = previous if self.weights is None else self.weights
            self.weights = class_weights(self.metric, confusion, previous, self.memory, self.rate)
        multipliers = None
        if self.coverage is not None:
            multipliers = coverage_multipliers(self.coverage, confusion, *self.constraint)
        rises = slope(self.metric, confusion, self.weights, multipliers)
        gains = pair_gains(prototypes, logits, rises, (1 + self.minimum) / 2, self.reproduce_repository)
        self.distribution = pair_distribution(gains, self.temperature, self.smoothing)
        self.refreshed = module.global_step
        self.gains = [*self.gains[-9:], float(gains.max())]
        mean = sum(self.gains) / len(self.gains)
        if self.stop is not None and len(self.gains) == 10 and abs(mean - self.gains[-1]) < self.stop * abs(mean):
            module.trainer.should_stop = True
        for loader in _pair_loaders(module.trainer):
            partners = getattr(loader.dataset, "partners", None)
            if partners is not None:
                self.pseudo_labels = predicted_classes(module, partners, loader.collate_fn, loader.batch_size)
        self._hand_over(module)

    def _hand_over(self, module: Any) -> None:
        loaders = _pair_loaders(module.trainer)
        if not loaders:
            raise ValueError(
                "SelectiveMixup has no training loader whose sampler draws pairs of classes: use "
                "ImageData(class_pairs=True), or a LookAheadDataLoader over ClassPairs with a ClassPairSampler."
            )
        for loader in loaders:
            if self.distribution is not None:
                loader.sampler.set_pairs(self.distribution, self.minimum, self.pseudo_labels)

    # -- metrics and state ----------------------------------------------------------------------------------------

    def on_evaluated(self, module: FineTuningModule, stage: str, terms: StepTerms, dataloader_idx: int) -> None:
        assert isinstance(module, ImageClassifier)
        predicted = terms.outputs.logits[terms.units.index].argmax(1)
        for name in (*VALUES, "min_coverage"):
            key = f"{stage}_{name}" + (f"_{dataloader_idx}" if dataloader_idx else "")
            metric = metric_of(module, key, partial(ConfusionMetric, module.num_classes, name))
            metric.update(predicted, terms.units.labels)
            module.log(f"{stage}_{name}", metric, metric_attribute=f"metrics.{key}")

    def state_dict(self) -> dict[str, Any]:
        names = ("distribution", "weights", "gains", "refreshed", "pseudo_labels")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def class_statistics(module: Any, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Confusion counts [K, K], class means of features [K, D] and of logits [K, K], over batches and ranks, float64.

    The head being affine, the mean logits of a class are the logits of its mean feature.

    Args:
        module: An `ImageClassifier` in a run.
        batches: Labelled batches, on any device.
    """
    classes = module.num_classes
    counts, sums = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, 0, dtype=torch.float64)
    with _evaluating(module) as features_of:
        for batch in batches:
            features, logits = features_of(batch)
            labels = batch["labels"].cpu()
            kept = labels != IGNORED
            rows = torch.cat([features, logits], 1).double().cpu()[kept]
            sums = sums if sums.shape[1] else sums.new_zeros(classes, rows.shape[1])
            sums.index_add_(0, labels[kept], rows)
            counts += confusion_counts(logits.argmax(1).cpu()[kept], labels[kept], classes)
    counts, sums = (_sum_of_ranks(module, part) for part in (counts, sums))
    means = sums / counts.sum(1, keepdim=True)
    return counts, means[:, :-classes], means[:, -classes:]


def predicted_classes(module: Any, rows: Any, collate_fn: Callable[[list[Any]], Batch], batch_size: int) -> Tensor:
    """The class that the network takes each row for, [n], each rank having seen its share."""
    rank, ranks = module.trainer.global_rank, module.trainer.world_size
    found = torch.zeros(len(rows), dtype=torch.float64)
    # Every rank makes as many forwards: under FSDP2 they are collective. The last ones may repeat a row.
    per_rank = -(-len(rows) // ranks)
    own = torch.arange(rank, rank + per_rank * ranks, ranks)
    with _evaluating(module) as features_of:
        for chosen in own.split(batch_size):
            batch = collate_fn([rows[int(i) % len(rows)] for i in chosen])
            fits = chosen < len(rows)
            found[chosen[fits]] = features_of(batch)[1].argmax(1).cpu().double()[fits]
    return _sum_of_ranks(module, found).long()


@contextmanager
def _evaluating(module: Any) -> Iterator[Callable[[Batch], tuple[Tensor, Tensor]]]:
    """Gives what makes features and logits of a batch, in evaluation mode and without drawing a random number."""
    trainer: Any = module.trainer
    devices = [module.device] if module.device.type == "cuda" else []

    def features_of(batch: Batch) -> tuple[Tensor, Tensor]:
        moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        with trainer.precision_plugin.forward_context():
            return module.features(moved)

    with evaluation_mode(module), torch.random.fork_rng(devices=devices), torch.no_grad():
        yield features_of


def _sum_of_ranks(module: Any, tensor: Tensor) -> Tensor:
    if module.trainer.world_size == 1:
        return tensor
    return module.trainer.strategy.reduce(tensor.to(module.device), reduce_op="sum").cpu()


def _validation_batches(trainer: Any) -> Iterator[Batch]:
    loop = trainer.fit_loop.epoch_loop.val_loop
    # Loaders are there once validation or its sanity check has run.
    if loop._combined_loader is None and loop._data_source.is_defined():
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    if loop._combined_loader is None or not loop._combined_loader.flattened:
        raise ValueError("SelectiveMixup chooses pairs by a metric on validation data, and there is none: give some.")
    yield from loop._combined_loader.flattened[0]


def _pair_loaders(trainer: Any) -> list[Any]:
    loaders = trainer.fit_loop._combined_loader.flattened
    return [loader for loader in loaders if hasattr(getattr(loader, "sampler", None), "set_pairs")]


class SelectiveMixupMixin:
    """Adds `SelectiveMixup` to an `ImageClassifier`.

    Args:
        selmix_metric: "mean_recall", "min_recall", "geometric_mean", "harmonic_mean" or "min_head_tail_recall".
        selmix_coverage: Constrain how often each "class" is predicted, or the means of "head_tail".
        selmix_temperature: T; the larger, the more pairs take part.
        selmix_every: Optimizer steps from one choice of pairs to the next.
        selmix_minimum: lambda_min, in [0.5, 1].
        selmix_smoothing: Added to every P_ij.
        selmix_stop: Stop when the largest gain lies within this fraction of the mean of the last 10; None goes on.
        selmix_rate: For the minima: the larger, the more the worst class (or group) counts.
        selmix_memory: beta, for "min_recall": how much of the last weights of classes is kept, in the exponent.
        selmix_share: alpha, the part of 1 / K that each class's predictions are to reach.
        selmix_softness: tau of that constraint.
        selmix_largest: Lambda, its largest multiplier.
        selmix_reproduce_repository: The positive part of the logit's change as in the published code.
    """

    def __init__(
        self,
        *args: Any,
        selmix_metric: str = "min_recall",
        selmix_coverage: str | None = None,
        selmix_temperature: float = 0.1,
        selmix_every: int = 50,
        selmix_minimum: float = 0.6,
        selmix_smoothing: float = 0.0,
        selmix_stop: float | None = 0.05,
        selmix_rate: float = 50.0,
        selmix_memory: float = 0.0,
        selmix_share: float = 0.95,
        selmix_softness: float = 0.01,
        selmix_largest: float = 100.0,
        selmix_reproduce_repository: bool = False,
        **kwargs: Any,
    ) -> None:
        objective = SelectiveMixup(
            selmix_metric,
            selmix_coverage,
            selmix_temperature,
            selmix_every,
            selmix_minimum,
            selmix_smoothing,
            selmix_stop,
            selmix_rate,
            selmix_memory,
            selmix_share,
            selmix_softness,
            selmix_largest,
            selmix_reproduce_repository,
        )
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class SelectiveMixupImageClassifier(SelectiveMixupMixin, ImageClassifier):
    """`ImageClassifier` with selective mixup, ready for YAML.

    Args:
        *args: The arguments of `ImageClassifier`.
        **kwargs: Those of `SelectiveMixupMixin` and `ImageClassifier`.
    """
