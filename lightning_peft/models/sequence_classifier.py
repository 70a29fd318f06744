"""Sequence classification: a unit of the loss is an example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.kernels import Rows
from lightning_peft.models.fine_tuning_module import FineTuningModule, StepTerms
from lightning_peft.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch

IGNORED = -100


def rows_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Rows]:
    """Differentiable nll [n] of small logits [n, classes], and its detached rows; -100 labels must be gone."""
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    index = torch.arange(len(labels), device=labels.device)
    return nll, Rows(nll.detach(), entropy, logits.argmax(-1) == labels, labels, index)


class UnitModule(FineTuningModule):
    """A module whose units (examples, pairs) fit one logits matrix: `logits_and_labels` is all that a subclass says."""

    def logits_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """Logits [n, classes], labels [n] (-100 is not learnt) and what the network returned."""
        raise TypeError(f"{type(self).__name__} must override logits_and_labels.")

    def terms(self, batch: Batch, counts: dict[str, Tensor]) -> StepTerms:
        batch = self.before_forward(batch)
        logits, labels, outputs = self.logits_and_labels(batch)
        chosen = (labels != IGNORED).nonzero().squeeze(1)
        nll, units = rows_of(logits[chosen], labels[chosen])
        units = units._replace(index=chosen)
        weights = self.loss_weights(batch, units)
        weighted = nll if weights is None else weights * nll
        loss = weighted.sum() / counts["loss"].clamp(min=1)
        sums, own = {"loss": weighted.detach().sum()}, {"loss": len(chosen)}
        auxiliary = self.auxiliary_losses(batch, outputs)
        own_counts = self.counts(batch) if auxiliary else {}
        for name, numerator in auxiliary.items():
            loss = loss + numerator / counts[name].clamp(min=1)
            sums[name], own[name] = numerator.detach(), own_counts[name]
        given = None if weights is None else weights.detach()
        return StepTerms(loss, sums, own, units, given, outputs=outputs)


class SequenceClassifier(UnitModule):
    """Any sequence classifier of transformers.

    Batches hold `input_ids`, `attention_mask` [batch, time] and `labels` [batch] (class indices; -100 is not learnt).

    Args:
        model: Hub name, folder, or a network that is already built.
        num_labels: Number of classes of a network loaded by name.
        **kwargs: The arguments of `FineTuningModule`.

    Raises:
        ValueError: `num_labels` is below 2.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, model: str | nn.Module, num_labels: int = 2, **kwargs: Any) -> None:
        if num_labels < 2:
            raise ValueError(f"num_labels={num_labels}: a classifier needs at least 2 classes.")
        self._num_labels = num_labels
        super().__init__(model=model, **kwargs)

    def load_network(self, model: str, dtype: str, attn: str | None, revision: str | None, trust: bool) -> nn.Module:
        network = load_pretrained(self.auto_class, model, dtype, attn, revision, trust, num_labels=self._num_labels)
        if network.config.pad_token_id is None and self.tokenizer is not None:
            network.config.pad_token_id = (
                self.tokenizer.pad_token_id
            )  # decoders read the last token that is not padding
        return network

    def count_units(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def logits_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        outputs = self.model(**inputs)
        return outputs.logits, batch["labels"], outputs

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities, [batch, classes]."""
        return self.logits_and_labels({"labels": None, **batch})[0].float().softmax(-1)
