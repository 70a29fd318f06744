"""LightningModules as others write them: plain Lightning and transformers, no import of ours (FINDINGS, 22)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from tests import tiny

NETWORKS = {
    "llama": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "bert": tiny.tiny_bert,
    "vit": tiny.tiny_vit,
    "mixtral": tiny.tiny_mixtral,
}


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """One loss a row, [batch]; then the mean over equal batches is the mean over their union."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return nll.sum(1) / (labels != -100).sum(1)


class BuiltInInit(L.LightningModule):
    """The network is there from the start, everything trains.

    Args:
        network: Family of the tiny network.
        dropout: Its dropout.
        optimizer: "sgd" or "adamw".
        learning_rate: Its learning rate.
    """

    def __init__(
        self, network: str = "llama", dropout: float = 0.0, optimizer: str = "sgd", learning_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def build(self) -> None:
        self.model = NETWORKS[self.hparams["network"]](dropout=self.hparams["dropout"])

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in next(m for m in self.model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
        return row_losses(self.model(**inputs).logits, batch["labels"]).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.hparams["optimizer"]]

    def configure_optimizers(self) -> Any:
        return self.optimizer_class()(self.parameters(), lr=self.hparams["learning_rate"])


class BuiltInConfigureModel(BuiltInInit):
    """The network is built in `configure_model`, as FSDP2 wants it for large ones."""

    def build(self) -> None:
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            super().build()
        super().configure_model()


class FilterWithWarmup(BuiltInInit):
    """The optimizer takes what requires a gradient; the learning rate warms up over two steps."""

    def configure_optimizers(self) -> Any:
        trained = filter(lambda p: p.requires_grad, self.parameters())
        optimizer = self.optimizer_class()(trained, lr=self.hparams["learning_rate"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoGroups(BuiltInInit):
    """Matrices decay, everything else does not and learns more slowly."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        rate = self.hparams["learning_rate"]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": rate / 2}]
        return self.optimizer_class()(groups, lr=rate)


class Manual(BuiltInInit):
    """Manual optimisation: Lightning neither scales the loss nor steps."""

    def __init__(
        self, network: str = "llama", dropout: float = 0.0, optimizer: str = "sgd", learning_rate: float = 0.1
    ) -> None:
        super().__init__(network, dropout, optimizer, learning_rate)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None


KINDS = (BuiltInInit, BuiltInConfigureModel, FilterWithWarmup, TwoGroups, Manual)
