"""Text encoders trained by contrast: a unit of the loss is a query with its document among all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.models.sequence_classifier import UnitModule

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch

POOLINGS = ("mean", "cls", "last")


class TextEncoder(UnitModule):
    """Any encoder of transformers as a bi-encoder with in-batch negatives (InfoNCE).

    Batches hold `query` and `document`, each a dictionary of `input_ids` and `attention_mask` [batch, time]; row i of
    the one belongs to row i of the other, every other document is a negative. Under DDP and FSDP the documents of all
    ranks are negatives; micro-batches of an accumulation are not, which is what in-batch means.

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
        return len(batch["query"]["input_ids"])

    def logits_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        queries, documents = self.embed(batch["query"]), self.embed(batch["document"])
        labels = torch.arange(len(queries), device=queries.device)
        if self._trainer is not None and self.trainer.world_size > 1:
            gathered = self.all_gather(documents, sync_grads=torch.is_grad_enabled())
            documents = gathered.flatten(0, 1)
            labels = labels + self.trainer.global_rank * len(queries)
        return queries @ documents.T / self.temperature, labels, {"query": queries, "document": documents}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Unit vectors of `batch` (an ordinary tokenised batch, or its "query"), [batch, width]."""
        inputs = batch.get("query", batch)
        return self.embed({k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in inputs})
