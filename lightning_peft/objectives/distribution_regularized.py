"""Fine-tuning whose head also classifies the pretrained network's features (DR-Tune, ICCV 2023, arXiv 2308.12058).

The downstream encoder f^d (in training) and the pretrained one f^p (frozen) start from the same weights. Queues hold
the last K features of both and their labels. Each step the pretrained features of the queue are brought to where the
downstream ones are now (semantic calibration) and the head is trained on both:

    L = ( sum_{i in batch} CE(h(f^d_i), y_i)  +  sum_{j in queue} CE(h(c(f^p_j)), y_j) ) / (B + K)

so that the head, and through it the encoder, may not leave the pretrained distribution. Calibration c, all of it
without gradient, on L2-normalised features:

    rotation     R = argmin_{R in SO(D)} || R X - Y ||,  X, Y the centred pretrained and downstream features [D, K]
    translation  of each class, from its pretrained centre (the mean) to its downstream centre, where features weigh by
                 their confidence, softmax over the class of f . w_c / |w_c|
    scale        unit length, times the mean length of the step's downstream features

Inference uses the encoder and the head only.

Where the published code (weeknan/DR-Tune) departs from the paper or from itself, and what stands here: its loss is the
mean over B + K (so the encoder's gradient is B / (B + K) of the usual, and its learning rates are made for that), the
paper's is `mean_B + lambda mean_K`: `dr_coefficient`. It rotates in every 10th step of an epoch; here in every 10th
step of the run. Classes that the queue lacks, or holds once, get a shift of NaN or of one scalar there; here none, or
a vector. Its queue breaks where K is no multiple of B. Its warm-up overwrites the queue's first rows again; here it
ends when the queue is full.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.models.image_classifier import ImageClassifier, classification_head
from lightning_peft.models.output_head import matrix_of
from lightning_peft.models.sequence_classifier import IGNORED
from lightning_peft.objectives.objective import HeadTerm, Objective, TrunkState

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch


class FeatureQueue:
    """The last `size` rows of downstream and pretrained features with their labels, oldest first.

    Args:
        size: K, rows that it holds at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.downstream = self.pretrained = torch.empty(0, 0)
        self.labels = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def append(self, downstream: Tensor, pretrained: Tensor, labels: Tensor) -> None:
        """Adds rows [n, D], [n, D], [n], in any number, in fp32; the oldest leave."""
        new = (downstream.detach().float(), pretrained.detach().float(), labels)
        held = (self.downstream, self.pretrained, self.labels) if len(self) else tuple(part[:0] for part in new)
        joined = (torch.cat([old.to(rows.device), rows])[-self.size :] for old, rows in zip(held, new))
        self.downstream, self.pretrained, self.labels = joined

    def state_dict(self) -> dict[str, Tensor]:
        """The rows."""
        return {"downstream": self.downstream, "pretrained": self.pretrained, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self.downstream, self.pretrained, self.labels = (state[k] for k in ("downstream", "pretrained", "labels"))


def rotation(source: Tensor, target: Tensor) -> Tensor:
    """R in SO(D) that takes the centred `source` rows nearest to the centred `target` rows, as R x [D, D].

    Args:
        source: [K, D].
        target: [K, D], row by row the same examples.
    """
    centred = source - source.mean(0), target - target.mean(0)
    u, _, vh = torch.linalg.svd(centred[0].T @ centred[1])  # S = X Y^T = U Sigma V^T
    v = vh.T.clone()
    v[:, -1] *= torch.det(v @ u.T).sign()  # a reflection is no rotation
    return v @ u.T  # R = V U^T


def semantic_calibration(
    pretrained: Tensor, downstream: Tensor, labels: Tensor, head: Tensor, rotate: bool = True
) -> Tensor:
    """Pretrained features where the downstream ones are, of unit length [K, D].

    Args:
        pretrained: Features of the frozen encoder, [K, D].
        downstream: Of the encoder in training, row by row of the same images, [K, D].
        labels: Their classes [K].
        head: The head's rows w_c, [classes, D].
        rotate: Whether to rotate the whole set before classes are translated.
    """
    x, y = F.normalize(pretrained, dim=1), F.normalize(downstream, dim=1)
    if rotate:
        x = (x - x.mean(0)) @ rotation(x, y).T
    member = F.one_hot(labels, len(head)).to(x.dtype).T  # [classes, K]
    confidence = (y * F.normalize(head, dim=1)[labels]).sum(1).exp()  # softmax within a class; cosines need no maximum
    # A class without a row has no members either: its centres are read by nobody.
    mean = (member @ x) / member.sum(1, keepdim=True).clamp(min=1)
    weighted = member * confidence
    centre = (weighted @ y) / weighted.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return F.normalize(x + (centre - mean)[labels], dim=1)


class DistributionRegularized(Objective):
    """The head's loss on calibrated pretrained features, beside the loss of the images.

    Under DDP and FSDP2 every rank holds the queue of all ranks' features and classifies its share; the queue moves once
    an optimizer step, so micro-batches and ranks give what one large batch gives. The frozen network is a copy made
    when the module is, outside of the checkpoint: a resumed run must start from the same weights.

    Args:
        dr_queue_size: K.
        dr_rotation_every: Optimizer steps from one rotation to the next (it takes an SVD of [D, D]); the others
            translate only. 0 never rotates.
        dr_coefficient: lambda, in front of the queue's mean; by default the mean is over batch and queue together.
        dr_warm_up: Fill the queue before the first step with training rows, both features those of the pretrained
            network. Without (and for streamed data) it fills as training goes.

    Raises:
        ValueError: An argument is out of range, the module is no `ImageClassifier`, or a resumed run starts from other
            pretrained weights.
    """

    def __init__(
        self,
        dr_queue_size: int = 2048,
        dr_rotation_every: int = 10,
        dr_coefficient: float | None = None,
        dr_warm_up: bool = True,
    ) -> None:
        if dr_queue_size < 1:
            raise ValueError(f"dr_queue_size={dr_queue_size} must be at least 1.")
        if dr_rotation_every < 0:
            raise ValueError(f"dr_rotation_every={dr_rotation_every} must be at least 1, or 0 to never rotate.")
        if dr_coefficient is not None and not dr_coefficient >= 0:
            raise ValueError(
                f"dr_coefficient={dr_coefficient} must be at least 0, or None for the mean over batch and queue."
            )
        self.rotation_every, self.coefficient, self.warm_up = dr_rotation_every, dr_coefficient, dr_warm_up
        self.queue = FeatureQueue(dr_queue_size)
        self._reference: list[nn.Module] = []
        self._checksum = 0.0
        self._expected: float | None = None  # of the run that is resumed
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # of the step's earlier micro-batches

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, ImageClassifier):
            raise ValueError(
                f"DistributionRegularized works on the features of an ImageClassifier, and {type(module).__name__} is "
                "none: use DistributionRegularizedImageClassifier, or the mixin with ImageClassifier."
            )
        reference = copy.deepcopy(module.model).requires_grad_(False).eval()
        self._reference = [reference]  # in a list: no part of the module, its checkpoint or its shards
        self._checksum = float(sum(p.double().sum() for p in reference.parameters()))

    # -- passes ---------------------------------------------------------------------------------------------------

    def on_train_start(self, module: FineTuningModule) -> None:
        if self._expected is not None and abs(self._expected - self._checksum) > 1e-6 * (1 + abs(self._expected)):
            raise ValueError(
                "the checkpoint was made with other pretrained weights than the network had when this module was "
                "built: build it from the weights that the first run started from, for they regularise."
            )
        parameter = next(module.model.parameters())
        self._reference[0].to(parameter.device, parameter.dtype)
        self._pending = []
        if self.warm_up and not len(self.queue):
            self._fill(module)

    def _fill(self, module: Any) -> None:
        """The queue from training rows, drawn once over all ranks; no loader or generator of the run is touched."""
        loader = module.trainer.fit_loop._combined_loader.flattened[0]
        rows = getattr(loader, "dataset", None)
        if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            return
        assert rows is not None
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.queue.size]
        per_batch = (loader.batch_size or 1) * module.trainer.world_size
        plugin, strategy = module.trainer.precision_plugin, module.trainer.strategy
        for chosen in order.split(per_batch):
            own = chosen[module.trainer.global_rank :: module.trainer.world_size]
            features = torch.empty(0, 1, device=module.device)
            labels = torch.empty(0, dtype=torch.long, device=module.device)
            if len(own):
                batch = module.transform_batch(loader.collate_fn([rows[int(i)] for i in own]))
                batch = strategy.batch_to_device(plugin.convert_input(batch))
                with plugin.forward_context():
                    features, labels = self._pretrained(module, batch).float(), batch["labels"]
            self.queue.append(*_learnt_of_all_ranks(module, features, features, labels))

    @torch.no_grad()
    def _pretrained(self, module: Any, batch: Batch) -> Tensor:
        return module.features(batch, self._reference[0])[0]

    def before_forward(self, module: FineTuningModule, batch: Batch) -> Batch:
        return {**batch, "pretrained_features": self._pretrained(module, batch)} if module.training else batch

    # -- the step -------------------------------------------------------------------------------------------------

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        return {"distribution": module.count_units(batch)}

    def _share(self, module: FineTuningModule) -> float | Tensor:
        """B / (B + K) with B the images of the optimizer step; 1 in the paper's form."""
        images = module._step_counts["loss"]
        return 1.0 if self.coefficient is not None else images / (images + self.queue.size)

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        if not module.training or self.coefficient is not None:
            return None
        return torch.ones_like(units.nll) * self._share(module)

    def head_terms(self, module: FineTuningModule, batch: Batch, trunk: TrunkState) -> list[HeadTerm]:
        if not module.training:
            return []
        if batch.get("step_start", True):
            self._pending = []
        rows = (trunk.final.detach().float(), batch["pretrained_features"].float(), batch["labels"])
        self._pending.append(rows)
        if not batch.get("step_end", True):
            return []
        with torch.no_grad(), torch.autocast(trunk.final.device.type, enabled=False):
            parts = _learnt_of_all_ranks(module, *(torch.cat(part) for part in zip(*self._pending)))
            self._pending = []
            # Of a loader that does not look ahead every micro-batch ends a step of its own.
            looked_ahead = "step_end" in batch or module._trainer is None
            micro_batches = 1 if looked_ahead else module.trainer.accumulate_grad_batches
            terms = self._terms(module, parts[0], trunk, micro_batches)
            self.queue.append(*parts)
        return terms

    def _terms(
        self, module: FineTuningModule, features: Tensor, trunk: TrunkState, micro_batches: int
    ) -> list[HeadTerm]:
        """The term, of this rank's share of the queue, from all of the step's downstream features."""
        if not len(features) or not len(self.queue):
            return []
        held = (self.queue.pretrained, self.queue.downstream, self.queue.labels)
        pretrained, downstream, labels = (part.to(features.device) for part in held)
        rotate = self.rotation_every > 0 and module.global_step % self.rotation_every == 0
        head = _head_rows(module, trunk, features)
        calibrated = semantic_calibration(pretrained, downstream, labels, head, rotate)
        calibrated = calibrated * features.norm(dim=1).mean()  # scale
        # Of the kernel's form, coefficient / B * sum_j nll_j: the queue's mean times K / (B + K), or lambda.
        images = module._step_counts["loss"]
        wanted: Any = self._share(module) * self.queue.size if self.coefficient is None else self.coefficient * images
        coefficient = wanted / len(self.queue) / micro_batches
        rank, ranks = (module.trainer.global_rank, module.trainer.world_size) if module._trainer is not None else (0, 1)
        own = slice(rank, None, ranks)
        return [HeadTerm("distribution", calibrated[own].to(trunk.final.dtype), labels[own], coefficient)]

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**self.queue.state_dict(), "checksum": self._checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue.load_state_dict(state)
        self._expected = state["checksum"]


def _head_rows(module: Any, trunk: TrunkState, like: Tensor) -> Tensor:
    """w_c [classes, D] in fp32; of a head that is more than a matrix what it makes of the unit vectors."""
    matrix = matrix_of(classification_head(module.model))
    if matrix is not None:
        return matrix[0].float()
    assert trunk.logits is not None
    unit = torch.eye(like.shape[1], device=like.device, dtype=trunk.final.dtype)
    return (trunk.logits(unit) - trunk.logits(torch.zeros_like(unit[:1]))).T.float()


def _learnt_of_all_ranks(
    module: Any, downstream: Tensor, pretrained: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every rank's rows with a label, in the order in which one process would have them: ranks take every R-th row."""
    if module._trainer is not None and module.trainer.world_size > 1:
        sizes = module.all_gather(torch.tensor([len(labels), downstream.shape[1]], device=module.device)).amax(0)

        def gathered(rows: Tensor, fill: float) -> Tensor:
            padded = rows.new_full(tuple(sizes.tolist())[: rows.ndim], fill)
            padded[tuple(slice(0, n) for n in rows.shape)] = rows
            return module.all_gather(padded).transpose(0, 1).flatten(0, 1)

        downstream, pretrained, labels = gathered(downstream, 0), gathered(pretrained, 0), gathered(labels, IGNORED)
    learnt = labels != IGNORED
    return downstream[learnt], pretrained[learnt], labels[learnt]


class DistributionRegularizedMixin:
    """Adds `DistributionRegularized` to an `ImageClassifier`.

    Args:
        dr_queue_size: K, features that the queue holds.
        dr_rotation_every: Optimizer steps from one rotation of the queue to the next; 0 never rotates.
        dr_coefficient: lambda, in front of the queue's mean; by default the mean is over batch and queue together.
        dr_warm_up: Fill the queue before the first step.
    """

    def __init__(
        self,
        *args: Any,
        dr_queue_size: int = 2048,
        dr_rotation_every: int = 10,
        dr_coefficient: float | None = None,
        dr_warm_up: bool = True,
        **kwargs: Any,
    ) -> None:
        objective = DistributionRegularized(dr_queue_size, dr_rotation_every, dr_coefficient, dr_warm_up)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class DistributionRegularizedImageClassifier(DistributionRegularizedMixin, ImageClassifier):
    """`ImageClassifier` with distribution regularisation, ready for YAML.

    Args:
        *args: The arguments of `ImageClassifier`.
        **kwargs: Those of `DistributionRegularizedMixin` and `ImageClassifier`.
    """
