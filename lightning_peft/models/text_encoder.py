"""Text encoders trained by contrast: a unit of the loss is a query with its document among all others."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.models.fine_tuning_module import StepTerms
from lightning_peft.models.retrieval_metrics import RetrievalRank
from lightning_peft.models.sequence_classifier import IGNORED, UnitModule
from lightning_peft.models.token_metrics import metric_of

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch

POOLINGS = ("mean", "cls", "last")


class TextEncoder(UnitModule):
    """Any encoder of transformers as a bi-encoder with in-batch negatives (InfoNCE).

    Batches hold `query` and `document`, each a dictionary of `input_ids` and `attention_mask` [batch, time]; row i of
    the one belongs to row i of the other, every other document is a negative. Under DDP and FSDP the documents of all
    ranks are negatives; micro-batches of an accumulation are not, which is what in-batch means. With `labels` [batch],
    rows of -100 are neither learnt nor negatives. Validation and test log `{stage}_mrr@10`, `{stage}_recall@1` and
    `{stage}_recall@10` among all documents of their data.

    Args:
        model: Hub name, folder, or a network that is already built.
        pooling: "mean" over tokens, "cls" (the first) or "last" (the last token that is not padding).
        temperature: Cosine similarities are divided by it.
        **kwargs: The arguments of `FineTuningModule`.

    Raises:
        ValueError: `pooling` is unknown or `temperature` is not above 0.
    """

    auto_class = "AutoModel"

    def __init__(self, model: str | nn.Module, pooling: str = "mean", temperature: float = 0.05, **kwargs: Any) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not known: use one of {POOLINGS}.")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        super().__init__(model=model, **kwargs)
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):  # BERT's reads the first token for a task of pre-training: nothing here does
            pooler.requires_grad_(False)
        self.pooling, self.temperature = pooling, temperature

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Unit vectors [batch, width] in fp32."""
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].to(hidden.dtype)
        if self.pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            places = torch.arange(mask.shape[1], device=mask.device)
            pooled = hidden[torch.arange(len(hidden), device=mask.device), (mask * places).argmax(1)]
        return nn.functional.normalize(pooled, dim=-1)

    def count_units(self, batch: Batch) -> int:
        return len(batch["query"]["input_ids"]) if "labels" not in batch else int((batch["labels"] != IGNORED).sum())

    def logits_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        queries, documents = self.embed(batch["query"]), self.embed(batch["document"])
        labels = torch.arange(len(queries), device=queries.device)
        counted = torch.ones_like(labels, dtype=torch.bool) if "labels" not in batch else batch["labels"] != IGNORED
        vectors, negatives = {"query": queries, "document": documents}, counted
        if self._trainer is not None and self.trainer.world_size > 1:
            gathered = self.all_gather(documents, sync_grads=torch.is_grad_enabled())
            documents, negatives = gathered.flatten(0, 1), self.all_gather(counted).flatten(0, 1)
            labels = labels + self.trainer.global_rank * len(queries)
        similarity = queries @ documents.T / self.temperature
        similarity = similarity.masked_fill(~negatives, torch.finfo(similarity.dtype).min)
        return similarity, labels.masked_fill(~counted, IGNORED), vectors

    def _evaluate(self, batch: Batch, stage: str, dataloader_idx: int) -> dict[str, StepTerms]:
        made = super()._evaluate(batch, stage, dataloader_idx)
        kept = made["terms"].units.index
        queries, documents = (made["terms"].outputs[side][kept] for side in ("query", "document"))
        for measure, k in (("mrr", 10), ("recall", 1), ("recall", 10)):
            name = f"{stage}_{measure}@{k}"
            key = f"{name}_{dataloader_idx}" if dataloader_idx else name
            metric = metric_of(self, key, partial(RetrievalRank, measure, k))
            metric.update(queries, documents)
            self.log(name, metric, metric_attribute=f"metrics.{key}")
        return made

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Unit vectors of `batch` (an ordinary tokenised batch, or its "query"), [batch, width]."""
        inputs = batch.get("query", batch)
        return self.embed({k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in inputs})
