"""Selective mixup (paper 110): gains against the paper's sums, a real step of the head, digits with a long tail."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft.datamodules import ClassPairs, ClassPairSampler, ImageData, LookAheadDataLoader
from lightning_peft.models import CausalLM, ImageClassifier
from lightning_peft.objectives import SelectiveMixup, SelectiveMixupImageClassifier
from lightning_peft.objectives.confusion_metrics import VALUES, class_weights, normalised_confusion, recalls, slope
from lightning_peft.objectives.selective_mixup import pair_distribution, pair_gains
from tests.models.test_image_classifier import collate, counts_of, images, tiny_resnet
from tests.tiny import tiny_llama, tiny_vit


def prototypes_and_head(k: int = 5, d: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, d, generator=generator).double() for n in (k, k, 1))  # z, W and, as a row, b


# -- the choice of pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reproduce", [False, True])
def test_gains_are_the_papers_four_sums(reproduce):
    z, w, bias = prototypes_and_head()
    bias, mean = bias[0, :5], 0.8
    rises = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.zeros(5, 5).double()
    for i in range(5):
        for j in range(5):
            mixed = mean * z[i] + (1 - mean) * z[j]
            p = (w @ mixed + bias).softmax(0)
            for q in range(5):
                for label in range(5):
                    change = -(mixed @ z[q]) * p[label]
                    if label == i:
                        change = change + (z[i] if reproduce else mixed) @ z[q]
                    expected[i, j] += rises[q, label] * change
    made = pair_gains(z, z @ w.T + bias, rises, mean, reproduce)
    torch.testing.assert_close(made, expected)


def test_gains_in_parts_are_those_at_once(monkeypatch):
    k = 70  # more than one part
    generator = torch.Generator().manual_seed(0)
    z, logits, rises = (torch.randn(k, n, generator=generator).double() for n in (9, k, k))
    z_ij = 0.8 * z[:, None] + 0.2 * z[None]
    p = (0.8 * logits[:, None] + 0.2 * logits[None]).softmax(-1)
    change = torch.einsum("ijd,qd->ijq", z_ij, z)
    expected = torch.einsum("ijq,qi->ij", change, rises) - torch.einsum("ijq,ql,ijl->ij", change, rises, p)
    torch.testing.assert_close(pair_gains(z, logits, rises, 0.8), expected)


def test_the_distribution_by_hand():
    gains = torch.tensor([[0.3, -0.2], [0.1, 0.0]]).double()
    weights = np.array([[np.exp(3.0), 0], [np.exp(1.0), 0]])
    made = pair_distribution(gains, 0.1)
    np.testing.assert_allclose(made.numpy(), weights / weights.sum(), atol=1e-7)
    assert float(made.min()) > 0
    torch.testing.assert_close(pair_distribution(-gains.abs(), 0.1), torch.full((2, 2), 0.25).double())
    smoothed = pair_distribution(gains, 0.1, smoothing=1 / 8)
    np.testing.assert_allclose(smoothed.numpy(), (weights / weights.sum() + 1 / 8) / 1.5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_step_of_the_head_on_the_best_pair_raises_the_metric_more_than_on_any(name):
    """The soft metric, with C the mean softmax of each class, after one real SGD step on the mixed prototype."""
    generator = torch.Generator().manual_seed(3)
    z, _, _ = prototypes_and_head()
    z = z + 0.3
    head = nn.Linear(7, 5).double()
    nn.init.normal_(head.weight, std=0.4, generator=generator)

    def confusion() -> torch.Tensor:
        return head(z).detach().softmax(1) / 5

    c = confusion()
    weights = class_weights(name, c, torch.full((5,), 0.2).double(), 0.0, 3.0) if "min" in name else None

    def metric() -> float:
        recall = recalls(confusion())
        return float((weights * recall).sum()) if weights is not None else float(VALUES[name](recall))

    gains = pair_gains(z, head(z).detach(), slope(name, c, weights), 0.8)
    start, state, rise = metric(), {k: v.clone() for k, v in head.state_dict().items()}, torch.zeros(5, 5)
    for i in range(5):
        for j in range(5):
            head.load_state_dict(state)
            loss = F.cross_entropy(head(0.8 * z[i] + 0.2 * z[j]), torch.tensor(i))
            (gradient,) = torch.autograd.grad(loss, head.weight)  # the theory moves the matrix alone
            with torch.no_grad():
                head.weight -= 1e-4 * gradient
            rise[i, j] = metric() - start
    torch.testing.assert_close(rise.double() / 1e-4, gains, rtol=1e-2, atol=1e-4)
    assert int(rise.argmax()) == int(gains.argmax())
    assert float(rise.max()) > float(rise.mean())


# -- the step ----------------------------------------------------------------------------------------------------------


def pair_batch(n: int = 5) -> dict:
    rows = images(40)
    sampler = ClassPairSampler([int(row["labels"]) for row in rows], pairs=n)
    (batch,) = DataLoader(ClassPairs(rows), batch_size=n, sampler=sampler)
    return batch


def test_loss_and_gradients_by_hand():
    module, batch = SelectiveMixupImageClassifier(tiny_vit()), pair_batch()
    made = module.transform_batch(batch)
    assert module.counts(made)["loss"] == 5  # partners are no units
    terms = module.terms(made, counts_of(module, made))
    network, part = module.model, batch["mixup"][:, None]
    first, second = (
        network.vit(batch[name]).last_hidden_state[:, 0] for name in ("pixel_values", "partner_pixel_values")
    )
    expected = F.cross_entropy(network.classifier(part * first + (1 - part) * second), batch["labels"])
    torch.testing.assert_close(terms.loss, expected)
    ours = torch.autograd.grad(terms.loss, list(network.parameters()), allow_unused=True)
    for a, b in zip(ours, torch.autograd.grad(expected, list(network.parameters()), allow_unused=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_may_have_weights():
    module, batch = SelectiveMixupImageClassifier(tiny_vit()), pair_batch()
    plain = module.transform_batch(batch)
    nll = module.terms(plain, counts_of(module, plain)).units.nll
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    made = module.transform_batch({**batch, "weight": weight})
    terms = module.terms(made, counts_of(module, made))
    torch.testing.assert_close(terms.loss, (weight * nll).sum() / 5)


def fit(module, path, data=None, **trainer) -> L.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    options = {**options, "enable_model_summary": False, **trainer}
    made = L.Trainer(accelerator="cpu", default_root_dir=path, **options)
    rows = images(40)
    sampler = ClassPairSampler([int(row["labels"]) for row in rows])
    train = LookAheadDataLoader(ClassPairs(rows), batch_size=4, sampler=sampler)
    made.fit(module, *(data or (train, DataLoader(images(21), batch_size=5, collate_fn=collate))))
    return made


def selmix(network=None, **kwargs) -> SelectiveMixupImageClassifier:
    options = {"learning_rate": 0.02, "optimizer": "sgd", "selmix_metric": "mean_recall"}
    return SelectiveMixupImageClassifier(network or tiny_vit(), **{**options, **kwargs})


def test_p_is_made_from_the_whole_validation_set_every_so_many_steps(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (objective,) = pl_module.objectives
            sampler = trainer.train_dataloader.sampler
            seen.append((objective.refreshed, sampler.distribution.clone(), sampler.minimum))

    module = selmix(selmix_every=4, selmix_minimum=0.9, selmix_temperature=0.5)
    batch = collate([row for row in images(21) if row["labels"] != -100])
    with torch.no_grad():
        features = module.model.vit(batch["pixel_values"]).last_hidden_state[:, 0].double()
        logits = module.model(batch["pixel_values"]).logits.double()
    fit(module, tmp_path, callbacks=[Look()], limit_val_batches=2)
    assert [step for step, *_ in seen] == [0] * 4 + [4] * 4 + [8] * 2
    assert [minimum for *_, minimum in seen] == [0.9] * 10
    assert torch.equal(seen[0][1], seen[3][1])
    assert not torch.equal(seen[3][1], seen[4][1])
    # By hand, at the start.
    counts = torch.zeros(3, 3)
    for label, predicted in zip(batch["labels"], logits.argmax(1)):
        counts[label, predicted] += 1
    means = torch.stack([features[batch["labels"] == c].mean(0) for c in range(3)])
    rises = slope("mean_recall", normalised_confusion(counts))
    gains = pair_gains(means, tiny_vit().classifier(means.float()).double().detach(), rises, 0.95)
    torch.testing.assert_close(seen[0][1], pair_distribution(gains, 0.5), rtol=1e-4, atol=1e-7)
    assert len(module.objectives[0].gains) == 3


def test_a_refresh_draws_no_random_number_and_keeps_modes(tmp_path):
    module = selmix(tiny_resnet(), selmix_every=10**6)
    fit(module, tmp_path, max_steps=1)
    module.train()
    modes = {name: part.training for name, part in module.named_modules()}
    state = torch.get_rng_state()
    module.objectives[0].refresh(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: part.training for name, part in module.named_modules()} == modes
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(part.training for part in norms)


def test_partners_get_new_pseudo_labels_with_each_p(tmp_path):
    rows, partners = images(40), images(23)
    sampler = ClassPairSampler([int(row["labels"]) for row in rows], partner_labels=[])
    train = LookAheadDataLoader(ClassPairs(rows, partners), batch_size=4, sampler=sampler)
    module = selmix(selmix_every=3)
    fit(module, tmp_path, (train, DataLoader(images(21), batch_size=5, collate_fn=collate)), max_steps=9)
    objective = module.objectives[0]
    assert objective.refreshed == 9
    with torch.no_grad():
        logits = module.model(torch.stack([row["pixel_values"] for row in partners])).logits
    assert torch.equal(objective.pseudo_labels, logits.argmax(1))
    assert [len(own) for own in sampler._rows[1]] == torch.bincount(logits.argmax(1)).tolist()


def test_training_stops_when_the_gain_has_settled(tmp_path):
    stopped = fit(selmix(selmix_every=1, learning_rate=0.0), tmp_path, max_epochs=3)
    assert stopped.global_step == 9  # the tenth P: one before the first step, one after each
    going = fit(selmix(selmix_every=1, learning_rate=0.0, selmix_stop=None), tmp_path, max_steps=12, max_epochs=3)
    assert going.global_step == 12


def test_state_is_restored(tmp_path):
    module = selmix(selmix_metric="min_recall", selmix_memory=0.5, selmix_every=2)
    fit(module, tmp_path, max_steps=5)
    torch.save(module.objectives[0].state_dict(), tmp_path / "state.pt")
    again = SelectiveMixup()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.distribution, module.objectives[0].distribution)
    assert torch.equal(again.weights, module.objectives[0].weights)
    assert (again.gains, again.refreshed) == (module.objectives[0].gains, 4)


def test_metrics_of_validation_are_logged(tmp_path):
    trainer = fit(selmix(), tmp_path)
    logged = {name for name in trainer.callback_metrics if name.startswith("val_")}
    assert {f"val_{name}" for name in (*VALUES, "min_coverage", "loss", "accuracy")} == logged


class Pixels(nn.Module):
    """A layer of random features under a linear head, as a network with a config."""

    class config:
        num_labels = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.classifier = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, pixel_values):
        class Outputs:
            logits = self.classifier(torch.tanh(self.hidden(pixel_values.flatten(1))))

        return Outputs


@pytest.mark.parametrize("name", ["mean_recall", "min_recall"])
def test_digits_with_a_long_tail(tmp_path, name):
    """Mean and worst recall on held-out digits rise over those of the network that plain training gave."""
    pytest.importorskip("sklearn")

    def data(**kwargs) -> ImageData:
        options = {"validation": 0.25, "test": 0.25, "imbalance": 30.0, "image_size": 8, "channels": 1}
        return ImageData("digits", batch_size=32, eval_batch_size=256, **options, **kwargs)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet = {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path, **options}
    network = Pixels()
    plain = ImageClassifier(network, learning_rate=0.05, optimizer="sgd", optimizer_args={"momentum": 0.9})
    L.Trainer(max_epochs=8, **quiet).fit(plain, data())
    trainer = L.Trainer(max_steps=120, max_epochs=-1, **{**quiet, "limit_val_batches": 1})
    module = SelectiveMixupImageClassifier(
        network,
        learning_rate=2e-3,
        head_learning_rate=2e-2,
        optimizer="sgd",
        lr_scheduler="constant",
        selmix_metric=name,
        selmix_every=30,
        selmix_stop=None,
    )
    own = data(class_pairs=True)
    (before,) = trainer.test(module, own, verbose=False)
    trainer.fit(module, own)
    (after,) = trainer.test(module, own, verbose=False)
    assert after["test_mean_recall"] > before["test_mean_recall"] + 0.03
    if name == "min_recall":  # the mean may rise while a class stays at 0
        assert after["test_min_recall"] > before["test_min_recall"] + 0.3


def test_what_it_needs_is_said(tmp_path):
    for name, value in {"selmix_metric": "accuracy", "selmix_coverage": "row", "selmix_minimum": 0.3}.items():
        with pytest.raises(ValueError, match=f"{name}="):
            selmix(**{name: value})
    for name in ("selmix_temperature", "selmix_every", "selmix_softness"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            selmix(**{name: 0})
    with pytest.raises(ValueError, match="ImageClassifier, and CausalLM is none"):
        CausalLM(tiny_llama(), objectives=[SelectiveMixup()])
    plain = LookAheadDataLoader(images(8), batch_size=4, collate_fn=collate)
    validation = DataLoader(images(21), batch_size=5, collate_fn=collate)
    with pytest.raises(ValueError, match="no training loader whose sampler draws pairs"):
        fit(selmix(), tmp_path, (plain, validation))
    sampler = ClassPairSampler([0, 1, 2])
    pairs = LookAheadDataLoader(ClassPairs(images(3)), batch_size=3, sampler=sampler)
    with pytest.raises(ValueError, match="there is none: give some"):
        fit(selmix(), tmp_path, (pairs,))
    lacking = DataLoader([row for row in images(9) if row["labels"] != 1], batch_size=5, collate_fn=collate)
    with pytest.raises(ValueError, match=r"classes \[1\] have no validation example"):
        fit(selmix(), tmp_path, (pairs, lacking))
    module = selmix()
    batch = collate(images(4))
    with pytest.raises(ValueError, match="no pairs to mix"):
        module.terms(batch, counts_of(module, batch))
