"""Distribution regularisation (paper 107): calibration against geometry done by hand, the queue against a list."""

from __future__ import annotations

import math
from collections import deque

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.models import CausalLM, ImageClassifier
from lightning_peft.objectives import DistributionRegularized, DistributionRegularizedImageClassifier
from lightning_peft.objectives.distribution_regularized import FeatureQueue, rotation, semantic_calibration
from tests.models.test_image_classifier import collate, counts_of, images, tiny_resnet
from tests.tiny import tiny_llama, tiny_vit


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    """A rotation: orthogonal, determinant +1."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q[:, 0] *= torch.det(q)
    return q


def features(n: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_known_rotation_is_recovered():
    x, r = features(60, 7), orthogonal(7)
    found = rotation(x, x @ r.T + 3)
    torch.testing.assert_close(found, r)
    assert float(torch.det(found)) == pytest.approx(1)


def test_of_a_reflection_the_nearest_rotation_is_taken():
    """Kabsch's problem by scipy, another implementation of it."""
    from scipy.spatial.transform import Rotation

    x = features(40, 3)
    y = x @ torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)) + 0.1 * features(40, 3, 5)
    found = rotation(x, y)
    expected, _ = Rotation.align_vectors((y - y.mean(0)).numpy(), (x - x.mean(0)).numpy())
    assert float(torch.det(found)) == pytest.approx(1)
    torch.testing.assert_close(found, torch.from_numpy(expected.as_matrix()))


def test_of_equal_features_calibration_is_the_identity_up_to_length():
    x = features(50, 6)
    labels = torch.arange(50) % 4
    made = semantic_calibration(x, x, labels, torch.zeros(4, 6, dtype=torch.float64))  # centres are plain means then
    torch.testing.assert_close(made, F.normalize(x, dim=1))


def calibrated_by_hand(x, y, labels, head, rotate):
    """The paper's three steps in numpy, class by class."""
    x, y, head = x.numpy(), y.numpy(), head.numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    if rotate:
        a, b = x - x.mean(0), y - y.mean(0)
        u, _, vt = np.linalg.svd(a.T @ b)
        sign = np.diag([1.0] * (x.shape[1] - 1) + [np.sign(np.linalg.det(vt.T @ u.T))])
        x = a @ (vt.T @ sign @ u.T).T
    x = x.copy()
    for c in set(labels.tolist()):
        member = labels.numpy() == c
        scores = y[member] @ (head[c] / np.linalg.norm(head[c]))
        weights = np.exp(scores) / np.exp(scores).sum()
        x[member] += weights @ y[member] - x[member].mean(0)
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("rotate", [True, False])
def test_calibration_by_hand_with_a_class_of_one_row_and_one_without(rotate):
    labels = torch.tensor([0] * 9 + [1] * 5 + [3])  # class 2 has no row, class 3 has one
    x, y, head = features(15, 6), features(15, 6, 2), features(4, 6, 3)
    made = semantic_calibration(x, y, labels, head, rotate)
    torch.testing.assert_close(made, calibrated_by_hand(x, y, labels, head, rotate))
    # The only row of a class goes where the downstream one is, as a vector.
    torch.testing.assert_close(made[-1], F.normalize(y[-1], dim=0))


# -- the queue ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 4, 4, 4], [11], [2, 0, 5, 1, 9]])
def test_the_queue_keeps_the_last_rows(sizes):
    """Batches that do not divide the queue, that are larger than it, that are empty."""
    queue, expected = FeatureQueue(7), deque(maxlen=7)
    for number, size in enumerate(sizes):
        down, pre = features(size, 2, number).float(), features(size, 2, 50 + number).float()
        labels = torch.arange(size)
        queue.append(down, pre, labels)
        expected.extend(zip(down, pre, labels))
    assert len(queue) == len(expected)
    for column, rows in enumerate(zip(*expected)):
        torch.testing.assert_close((queue.downstream, queue.pretrained, queue.labels)[column], torch.stack(rows))


# -- the step ----------------------------------------------------------------------------------------------------------


def regularised(network=None, **kwargs) -> DistributionRegularizedImageClassifier:
    options = {"dr_queue_size": 12, "dr_rotation_every": 1, "learning_rate": 0.05, "optimizer": "sgd"}
    return DistributionRegularizedImageClassifier(network or tiny_vit(), **{**options, **kwargs})


def filled(module: DistributionRegularizedImageClassifier, rows: int = 8) -> DistributionRegularized:
    """Its objective with a queue of features that differ."""
    (objective,) = module.objectives
    objective.queue.append(features(rows, 32).float(), features(rows, 32, 2).float(), torch.arange(rows) % 3)
    return objective


@pytest.mark.parametrize("coefficient", [None, 0.4])
def test_loss_and_gradients_by_hand(coefficient):
    """The mean over batch and queue of 12 (8 rows of it there yet), or the paper's sum of two means."""
    module = regularised(dr_coefficient=coefficient)
    objective, batch = filled(module), collate(images(7))
    counts = module.step_counts(batch)
    queue = [part.clone() for part in (objective.queue.pretrained, objective.queue.downstream, objective.queue.labels)]
    terms = module.terms(batch, counts)
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(terms.loss, parameters, allow_unused=True)

    network, kept = module.model, batch["labels"] != -100
    own = network.vit(batch["pixel_values"]).last_hidden_state[:, 0][kept]
    with torch.no_grad():
        calibrated = semantic_calibration(*queue, network.classifier.weight, rotate=True) * own.norm(dim=1).mean()
    images_loss = F.cross_entropy(network.classifier(own), batch["labels"][kept], reduction="sum")
    queue_loss = F.cross_entropy(network.classifier(calibrated), queue[2])  # a mean over the 8
    n, k = int(kept.sum()), 12
    expected = (images_loss + k * queue_loss) / (n + k) if coefficient is None else images_loss / n + 0.4 * queue_loss
    torch.testing.assert_close(terms.loss, expected)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters, allow_unused=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms.sums["distribution"] / terms.counts["distribution"], queue_loss.detach())

    # The batch was not in the queue that it was trained with; now it is, both features without gradient.
    assert len(objective.queue) == 12
    assert not objective.queue.downstream.requires_grad
    torch.testing.assert_close(objective.queue.downstream[-n:], own.detach())
    torch.testing.assert_close(objective.queue.pretrained[-n:], own.detach())  # the encoders are equal still


def test_the_frozen_network_takes_no_gradient_and_its_batch_norms_no_statistics(tmp_path):
    module = regularised(tiny_resnet())
    reference = module.objectives[0]._reference[0]
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    fit(module, tmp_path, max_epochs=1)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert not any("reference" in name for name in module.state_dict())
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved)


def test_evaluation_is_plain_classification():
    module = regularised()
    objective, batch = filled(module), collate(images(7))
    terms = module.eval().terms(batch, counts_of(module, batch))
    plain = ImageClassifier(module.model).eval()
    assert torch.equal(terms.loss, plain.terms(batch, counts_of(plain, batch)).loss)
    assert len(objective.queue) == 8


def fit(module, path, accumulate: int = 1, batch_size: int = 12, rows: int = 36, **trainer) -> L.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    options = {**options, "accumulate_grad_batches": accumulate, "enable_model_summary": False, **trainer}
    made = L.Trainer(accelerator="cpu", default_root_dir=path, **options)
    loader = LookAheadDataLoader(images(rows), batch_size=batch_size // accumulate, shuffle=True, collate_fn=collate)
    made.fit(module, loader)
    return made


def test_the_queue_is_filled_before_the_first_step_with_pretrained_features(tmp_path):
    seen = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            queue = pl_module.objectives[0].queue
            seen.setdefault("first", (queue.downstream.clone(), queue.pretrained.clone(), queue.labels.clone()))

    fit(regularised(dr_queue_size=20), tmp_path, max_steps=1, callbacks=[Look()])
    downstream, pretrained, labels = seen["first"]
    assert len(labels) <= 20
    assert len(labels) >= 12  # rows without a label are not in it
    assert torch.equal(downstream, pretrained)
    own = tiny_vit().eval().vit(torch.stack([row["pixel_values"] for row in images(36)])).last_hidden_state[:, 0]
    distance = (pretrained[:, None] - own.detach()[None]).norm(dim=2)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-5
    assert torch.equal(labels, torch.stack([row["labels"] for row in images(36)])[nearest.indices])
    seen.clear()
    fit(regularised(dr_warm_up=False), tmp_path, max_steps=1, callbacks=[Look()])
    assert len(seen["first"][2]) == 0


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_micro_batches_are_one_batch(tmp_path, coefficient):
    """Queue, length and denominators are those of the step; a micro-batch without any label changes nothing."""
    large, small = regularised(dr_coefficient=coefficient), regularised(dr_coefficient=coefficient)
    fit(large, tmp_path)
    fit(small, tmp_path, accumulate=4)
    for (name, a), b in zip(large.named_parameters(), small.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(large.objectives[0].queue.downstream, small.objectives[0].queue.downstream)


def test_a_step_without_any_label_is_no_step_of_the_queue(tmp_path):
    module = regularised()
    objective = filled(module)
    batch = collate([row for row in images(20) if row["labels"] == -100])
    terms = module.terms(batch, module.step_counts(batch))
    assert float(terms.loss) == 0
    assert len(objective.queue) == 8


def test_rotation_takes_turns(monkeypatch):
    from lightning_peft.objectives import distribution_regularized

    module, turns = regularised(dr_rotation_every=3), []
    filled(module)
    monkeypatch.setattr(
        distribution_regularized,
        "semantic_calibration",
        lambda x, y, labels, head, rotate: turns.append(rotate) or semantic_calibration(x, y, labels, head, rotate),
    )
    batch = collate(images(7))
    for step in range(5):
        monkeypatch.setattr(type(module), "global_step", property(lambda self, step=step: step))
        module.terms(batch, module.step_counts(batch))
    assert turns == [True, False, False, True, False]


def test_state_holds_queue_and_base_and_another_base_is_refused(tmp_path):
    module = regularised()
    fit(module, tmp_path, max_steps=2)
    state = module.objectives[0].state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = regularised()
    again.objectives[0].load_state_dict(loaded)
    assert torch.equal(again.objectives[0].queue.downstream, module.objectives[0].queue.downstream)
    other = tiny_vit()
    with torch.no_grad():
        other.vit.layernorm.weight.add_(1)
    stranger = regularised(other)
    stranger.objectives[0].load_state_dict(loaded)
    with pytest.raises(ValueError, match="other pretrained weights"):
        fit(stranger, tmp_path, max_steps=1)


def test_it_keeps_the_head_near_the_pretrained_distribution(tmp_path):
    """Trained on images that are brighter, the regularised network still knows the ones it was pretrained on."""
    losses = {}
    for name, kwargs in {"plain": {"dr_coefficient": 0.0}, "regularised": {"dr_coefficient": 1.0}}.items():
        torch.manual_seed(0)
        module = regularised(dr_queue_size=24, **kwargs)
        fit(module, tmp_path, max_epochs=8)
        reference = module.objectives[0]._reference[0]
        held = collate([row for row in images(36) if row["labels"] != -100])
        with torch.no_grad():
            old = reference.vit(held["pixel_values"]).last_hidden_state[:, 0]
            losses[name] = float(F.cross_entropy(module.model.classifier(old), held["labels"]))
    assert losses["regularised"] < losses["plain"]


def test_bad_arguments_name_themselves():
    for name, value in {"dr_queue_size": 0, "dr_rotation_every": -1, "dr_coefficient": -0.5}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            regularised(**{name: value})
    with pytest.raises(ValueError, match="dr_coefficient=nan"):
        regularised(dr_coefficient=math.nan)
    with pytest.raises(ValueError, match="ImageClassifier, and CausalLM is none"):
        CausalLM(tiny_llama(), objectives=[DistributionRegularized()])
