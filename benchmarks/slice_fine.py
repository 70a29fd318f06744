"""SliceFine against PEFT's LoRA (r = 8, all linear layers) on SmolLM2-135M, 4 x 128 tokens.

    .venv/bin/python benchmarks/slice_fine.py

Wanted, of the step of plain PEFT LoRA under transformers' own loss: at most 0.85 of its time for columns of rank 1 and
0.92 for rank 8, and for both 0.6 of its memory above the loaded network. LoRA by `callbacks.PEFT` shows what of it is
the fused loss alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from step_cost import SMOLLM2, costs, table, warnings_off  # noqa: E402

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PEER = "PEFT LoRA r=8, transformers' loss"


class PlainLoRA(L.LightningModule):
    """What somebody writes who has PEFT and transformers alone."""

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        from lightning_peft.models.pretrained import load_pretrained

        self.model = get_peft_model(load_pretrained("AutoModelForCausalLM", SMOLLM2), LoraConfig(**LORA))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def plain_lora() -> Any:
    return PlainLoRA(), []


def own_lora() -> Any:
    from lightning_peft.callbacks import PEFT

    return _causal_lm(), [PEFT({"peft_type": "LORA", **LORA})]


def slice_1() -> Any:
    from lightning_peft.callbacks import SliceFine

    return _causal_lm(), [SliceFine(rank=1, interval=4)]


def slice_8() -> Any:
    from lightning_peft.callbacks import SliceFine

    return _causal_lm(), [SliceFine(rank=8, interval=4)]


def slice_rows() -> Any:
    from lightning_peft.callbacks import SliceFine

    return _causal_lm(), [SliceFine(rank=8, orientation="row", interval=4)]


def _causal_lm() -> L.LightningModule:
    from lightning_peft.models import CausalLM

    return CausalLM(SMOLLM2, learning_rate=1e-4, lr_scheduler="constant")


CONTENDERS = {
    PEER: plain_lora,
    "callbacks.PEFT LoRA r=8": own_lora,
    "SliceFine column r=1": slice_1,
    "SliceFine column r=8": slice_8,
    "SliceFine row r=8": slice_rows,
}

if __name__ == "__main__":
    warnings_off()
    print(table(costs(CONTENDERS, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 12), PEER))
