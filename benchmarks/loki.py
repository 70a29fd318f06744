"""LoKI at a quota of 10 % against full fine-tuning of SmolLM2-135M, 4 x 128 tokens, AdamW.

    .venv/bin/python benchmarks/loki.py [STEPS]

Wanted of full fine-tuning's step: at most 0.8 of its time and 0.7 of its memory above the loaded network. Scores are
random numbers here: which rows train changes nothing of what a step costs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from step_cost import SMOLLM2, costs, table, warnings_off  # noqa: E402


def full() -> Any:
    from lightning_peft.models import CausalLM

    return CausalLM(SMOLLM2, lr_scheduler="constant"), []


def loki(quota: float = 10.0) -> Any:
    import torch

    from lightning_peft.attribution.knowledge_vectors import METHOD, down_weights
    from lightning_peft.callbacks import LoKI
    from lightning_peft.roles import weights_by_role
    from lightning_peft.scores import save_scores

    module = full()[0]
    downs = down_weights(weights_by_role(module.model))
    scores = {w.name: torch.randn(2, w.shape[0], generator=torch.Generator().manual_seed(0)) for w in downs}
    path = Path(tempfile.mkdtemp()) / "scores.safetensors"
    return module, [LoKI(quota, str(save_scores(path, scores, module.model, METHOD)))]


def loki_30() -> Any:
    return loki(30.0)


if __name__ == "__main__":
    warnings_off()
    contenders = {"full fine-tuning": full, "LoKI, 10 %": loki, "LoKI, 30 %": loki_30}
    print(table(costs(contenders, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 8), "full fine-tuning"))
