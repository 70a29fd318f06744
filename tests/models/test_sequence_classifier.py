"""Classifiers and encoders fit the same step: a unit is an example, or a pair."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.models import SequenceClassifier, TextEncoder
from lightning_peft.objectives import Objective
from tests.tiny import tiny_bert


def classified(n: int, time: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 128, (n, time), generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    labels[::4] = -100
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels)]


def collate(examples: list[dict]) -> dict:
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def classifier(**kwargs) -> SequenceClassifier:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    config = tiny_bert().config
    config.num_labels = 3
    return SequenceClassifier(BertForSequenceClassification(config).train(), lr_scheduler="constant", **kwargs)


def fit(module: L.LightningModule, path, examples, batch_size: int, accumulate: int, function=collate) -> dict:
    trainer = L.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, LookAheadDataLoader(examples, batch_size=batch_size, shuffle=False, collate_fn=function))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Focal(Objective):
    def loss_weights(self, module, batch, units):
        assert torch.equal(batch["labels"][units.index], units.labels)
        return (1 - torch.exp(-units.nll)) ** 2


def test_loss_weights_and_validation_by_hand(tmp_path):
    module, batch = classifier(objectives=[Focal()]).eval(), collate(classified(10))
    counts = {k: torch.tensor(float(v)) for k, v in module.counts(batch).items()}
    terms = module.terms(batch, counts)
    kept = batch["labels"] != -100
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[kept]
    nll = F.cross_entropy(logits, batch["labels"][kept], reduction="none")
    weights = ((1 - torch.exp(-nll)) ** 2).detach()
    expected = (weights * nll).sum() / kept.sum()
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, module.model.classifier.weight),
        torch.autograd.grad(expected, module.model.classifier.weight),
    )
    assert terms.counts["loss"] == int(kept.sum())


def test_accumulation_is_the_large_batch(tmp_path):
    kwargs = {"optimizer": "sgd", "learning_rate": 0.1}
    large = fit(classifier(**kwargs), tmp_path, classified(12), 6, 1)
    small = fit(classifier(**kwargs), tmp_path, classified(12), 2, 3)
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=0, atol=1e-6)


def pairs(n: int) -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(n):
        row = {}
        for side in ("query", "document"):
            ids = torch.randint(5, 128, (7,), generator=generator)
            mask = (torch.arange(7) < 5).long()
            row[side] = {"input_ids": ids, "attention_mask": mask}
        made.append(row)
    return made


def collate_pairs(rows: list[dict]) -> dict:
    return {side: collate([row[side] for row in rows]) for side in ("query", "document")}


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_contrast_with_in_batch_negatives_by_hand(pooling):
    module, batch = (
        TextEncoder(tiny_bert(head="BertModel"), pooling=pooling, temperature=0.1).eval(),
        collate_pairs(pairs(4)),
    )
    terms = module.terms(batch, {"loss": torch.tensor(4.0)})
    vectors = {}
    for side, inputs in batch.items():
        hidden = module.model(**inputs).last_hidden_state
        pooled = {"mean": hidden[:, :5].mean(1), "cls": hidden[:, 0], "last": hidden[:, 4]}[pooling]
        vectors[side] = F.normalize(pooled, dim=-1)
    similarity = vectors["query"] @ vectors["document"].T / 0.1
    torch.testing.assert_close(terms.loss, F.cross_entropy(similarity, torch.arange(4)), rtol=1e-5, atol=1e-6)


def test_an_encoder_trains(tmp_path):
    torch.manual_seed(0)
    module = TextEncoder(tiny_bert(head="BertModel"), learning_rate=5e-3, lr_scheduler="constant")
    before = module.terms(collate_pairs(pairs(8)), {"loss": torch.tensor(8.0)}).loss.item()
    fit(module, tmp_path, pairs(8) * 8, 8, 1, collate_pairs)
    after = module.terms(collate_pairs(pairs(8)), {"loss": torch.tensor(8.0)}).loss.item()
    assert after < before / 2


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="num_labels=1"):
        SequenceClassifier("anything", num_labels=1)
    with pytest.raises(ValueError, match="pooling='max'"):
        TextEncoder(tiny_bert(head="BertModel"), pooling="max")
    with pytest.raises(ValueError, match="temperature=0"):
        TextEncoder(tiny_bert(head="BertModel"), temperature=0)
