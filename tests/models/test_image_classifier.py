"""Image classifiers in the step: the loss by hand, the head wherever a network has it, groups and batch norms."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.models import ImageClassifier
from lightning_peft.models.image_classifier import classification_head
from lightning_peft.objectives import HeadTerm, Objective
from tests.tiny import tiny_vit


def images(n: int, classes: int = 3, size: int = 8) -> list[dict]:
    """Rows of which every fifth has no label, each class brighter than the last."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(1, size, size, generator=generator) + i % classes,
            "labels": torch.tensor(-100 if i % 5 == 4 else i % classes),
        }
        for i in range(n)
    ]


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def counts_of(module, batch) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()}


def tiny_resnet(classes: int = 3) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=classes
    )
    torch.manual_seed(0)
    return ResNetForImageClassification(config).train()


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_loss_and_gradients_by_hand(build):
    network = build()
    module, batch = ImageClassifier(network), collate(images(7))
    module.eval()  # the residual network's batch norm would make two forwards differ
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    ours = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    kept = batch["labels"] != -100
    expected = F.cross_entropy(network(batch["pixel_values"]).logits[kept], batch["labels"][kept])
    expected.backward()
    torch.testing.assert_close(terms.loss, expected)
    assert terms.counts["loss"] == int(kept.sum())
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)
    probabilities = module.predict_step({"pixel_values": batch["pixel_values"]}, 0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7))


def test_the_head_is_found_through_peft():
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    plain = tiny_vit()
    assert classification_head(plain) is plain.classifier
    residual = tiny_resnet()
    assert classification_head(residual) is residual.classifier[1]
    adapted = tiny_vit()
    inject_adapter_in_model(
        LoraConfig(r=3, target_modules=["classifier", "q_proj"]), adapted
    )  # lora_B has 3 outputs too
    assert classification_head(adapted) is adapted.classifier
    wrapped = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    batch = collate(images(4))
    features, logits = ImageClassifier(wrapped).eval().features(batch)
    own = wrapped.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(own(features), logits)
    network = tiny_vit()
    network.config.num_labels = 5
    with pytest.raises(ValueError, match="no linear layer with 5 outputs"):
        ImageClassifier(network)


class Further(Objective):
    """Doubles what the head reads in training and asks it to classify rows of its own."""

    def before_head(self, module, batch, hidden):
        return 2 * hidden

    def counts(self, module, batch):
        return {"further": 4}

    def head_terms(self, module, batch, trunk):
        self.features = trunk.final
        return [HeadTerm("further", trunk.final[:2].detach() + 1, torch.tensor([0, -100]), 3.0)]


def test_objectives_act_on_what_the_head_reads():
    objective = Further()
    module, batch = ImageClassifier(tiny_vit(), objectives=[objective]), collate(images(4))
    terms = module.terms(batch, counts_of(module, batch))
    network = module.model
    features = network.vit(batch["pixel_values"]).last_hidden_state[:, 0]
    torch.testing.assert_close(objective.features, features)
    main = F.cross_entropy(network.classifier(2 * features), batch["labels"])
    further = F.cross_entropy(network.classifier(features[:1].detach() + 1), torch.tensor([0]))
    torch.testing.assert_close(terms.loss, main + 3 / 4 * further)
    assert (float(terms.sums["further"]), terms.counts["further"]) == (
        pytest.approx(float(further.detach()), abs=1e-6),
        1,
    )
    ours = torch.autograd.grad(terms.loss, list(network.parameters()), allow_unused=True)
    hand = torch.autograd.grad(main + 3 / 4 * further, list(network.parameters()), allow_unused=True)
    for a, b in zip(ours, hand):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    module.eval()
    plain = module.terms(batch, counts_of(module, batch))
    torch.testing.assert_close(plain.units.nll.mean(), F.cross_entropy(network.classifier(features), batch["labels"]))


def test_the_head_has_its_own_rate():
    module = ImageClassifier(tiny_vit(), learning_rate=0.1, head_learning_rate=0.7, weight_decay=0.3)
    groups = module.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    head = module.model.classifier
    assert rate[id(head.weight)] == (0.7, 0.3)
    assert rate[id(head.bias)] == (0.7, 0.0)
    assert rate[id(module.model.vit.layernorm.weight)] == (0.1, 0.0)
    assert {group["weight_decay"] for group in ImageClassifier(tiny_vit()).parameter_groups()} == {0.0}


def test_frozen_batch_norms_stay_as_they_are(tmp_path):
    module = ImageClassifier(tiny_resnet(), freeze_batch_norm=True, learning_rate=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    norms = {name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **options
    )
    rows = images(12)
    loaders = [LookAheadDataLoader(rows, batch_size=4, collate_fn=collate)] * 2
    trainer.fit(module, *loaders)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not {name for name in changed if name.rpartition(".")[0] in norms}


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="num_labels=1"):
        ImageClassifier("anything", num_labels=1)
    with pytest.raises(ValueError, match="head_learning_rate=-1"):
        ImageClassifier(tiny_vit(), head_learning_rate=-1.0)


def test_a_network_by_name_with_another_number_of_classes(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    assert ImageClassifier(str(tmp_path)).num_classes == 3
    module = ImageClassifier(str(tmp_path), num_labels=7)
    assert module.model.classifier.weight.shape == (7, 32)
    torch.testing.assert_close(module.model.vit.layernorm.weight, tiny_vit().vit.layernorm.weight)
