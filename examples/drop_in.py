"""Third way of use: a technique as a callback, beside a LightningModule that knows nothing of it."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks import HalfFineTuning


class PlainModule(L.LightningModule):
    """A language model as anyone would write it with plain Lightning."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def main(max_steps: int = 20) -> None:
    """Each epoch trains another half of the weights: half the gradients and half the optimizer state."""
    L.seed_everything(0)
    rows = TensorDataset(torch.randint(0, 256, (64, 32)))
    trainer = L.Trainer(
        max_steps=max_steps, callbacks=[HalfFineTuning()], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(PlainModule(), DataLoader(rows, batch_size=8))
    print(f"train_loss {float(trainer.callback_metrics['train_loss']):.3f}")


if __name__ == "__main__":
    main()
