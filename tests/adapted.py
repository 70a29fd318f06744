"""LightningModules as anyone writes them, without an import of ours, for tests of adapters and checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from tests.tiny import VOCABULARY, tiny_bert, tiny_llama

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Rows(Dataset):
    """Fixed random token rows with a class label."""

    def __init__(self, n: int = 16, time: int = 8, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, VOCABULARY, (n, time), generator=generator)
        self.classes = torch.randint(0, 2, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"ids": self.ids[i], "class": self.classes[i]}


def loader(n: int = 16, batch_size: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(Rows(n), batch_size=batch_size, **kwargs)


class Foreign(L.LightningModule):
    """A language model; every parameter is given to the optimizer, trained or not."""

    def __init__(self, optimizer: str = "AdamW", lr: float = 1e-2, **network: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings = network
        self.optimizer, self.lr = optimizer, lr
        self.build()

    def build(self) -> None:
        self.net = tiny_llama(**self.settings)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


class BuiltLater(Foreign):
    """The same, its network built in `configure_model` and sharded there where there is a mesh."""

    def build(self) -> None:
        self.net = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = tiny_llama(**self.settings)
        if self._device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Classifier(Foreign):
    """A BERT classifier."""

    def build(self) -> None:
        self.net = tiny_bert(**self.settings)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(input_ids=batch["ids"], labels=batch["class"]).loss


def logits(network: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The network's answer to fixed rows, in eval mode."""
    ids = Rows(3, seed=5).ids if ids is None else ids
    mode = network.training
    with torch.no_grad():
        out = network.eval()(input_ids=ids)
    network.train(mode)
    return out.logits


def fit(module: L.LightningModule, callbacks: list[Any], steps: int = 4, path: Any = None, **kwargs: Any) -> L.Trainer:
    """A short run on the fixed rows."""
    ckpt = kwargs.pop("ckpt_path", None)
    kwargs.setdefault("enable_checkpointing", any("Checkpoint" in type(c).__name__ for c in callbacks))
    trainer = L.Trainer(**{**QUIET, "max_steps": steps, "default_root_dir": path, "callbacks": callbacks, **kwargs})
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return trainer
