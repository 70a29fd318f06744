"""Breadth-first against depth-first editing (paper 34): 200 changed facts in a small network, over seeds.

    .venv/bin/python benchmarks/localized_editing.py [--seeds 0 1 2] [--facts 200]

A network of two blocks learns facts; then the feed-forward part of its first block is edited, in mini-batches over all
edits, or one edit after the other to convergence. Prints, of each, reliability, generalisation and locality, and the
reliability of the first and last quarter of the edits.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import datasets
import lightning.pytorch as L
from step_cost import warnings_off
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_peft.callbacks import EditEvaluation, LocalizedEditing
from lightning_peft.datamodules import EditData
from lightning_peft.models import CausalLM

SUBJECTS, TARGETS = 60, 40
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<unk>", "asks", "says", "yes"]
    words += [f"s{i}" for i in range(SUBJECTS)] + [f"t{i}" for i in range(TARGETS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def facts(n: int, seed: int) -> list[dict[str, str]]:
    """A fact is known by two words; it is asked for in two ways, and others are not to change."""
    drawn = random.Random(seed)
    pairs = drawn.sample([(a, b) for a in range(SUBJECTS) for b in range(SUBJECTS)], 2 * n)
    return [
        {
            "prompt": f"asks s{a} s{b}",
            "rephrase": f"says s{a} s{b}",
            "locality": f"asks s{c} s{d}",
            "target_new": f"t{drawn.randrange(TARGETS)}",
        }
        for (a, b), (c, d) in zip(pairs[:n], pairs[n:])
    ]


def module(words: Any, rate: float) -> CausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    return CausalLM(network, tokenizer=words, learning_rate=rate, lr_scheduler="constant", weight_decay=0.0)


def run(n: int, seed: int) -> dict[str, dict[str, float]]:
    L.seed_everything(seed, verbose=False)
    words, known = tokenizer(), facts(n, seed)
    targets = random.Random(seed + 100)
    taught: list[dict[str, str]] = []
    for row in known:
        other = {"prompt": row["locality"], "target_new": f"t{targets.randrange(TARGETS)}"}
        taught += [row, {**row, "prompt": row["rephrase"]}, other]
    base = module(words, 2e-3)
    trainer = L.Trainer(accelerator="cpu", max_epochs=60, **QUIET)
    trainer.fit(base, EditData(taught, tokenizer=words, batch_size=60))
    edits = []
    for row in known:
        others = [word for word in (f"t{i}" for i in range(TARGETS)) if word != row["target_new"]]
        edits.append({**row, "target_new": targets.choice(others)})
    knew = EditEvaluation(known, max_new_tokens=2, batch_size=100).compare(base, base)
    found = {"base, old facts": knew}
    for order, epochs in (("breadth", 100), ("depth", 1)):
        edited = module(words, 1e-3)
        edited.load_state_dict(base.state_dict())
        data = EditData(edits, tokenizer=words, order=order, batch_size=40)
        callbacks = [LocalizedEditing(0, "ffn")]
        L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **QUIET).fit(edited, data)
        evaluation = EditEvaluation(edits, max_new_tokens=2, batch_size=100)
        hits = evaluation.hits(edited, evaluation.answers(base, "locality"))
        quarter = n // 4
        found[order] = {
            **{name: sum(one) / len(one) for name, one in hits.items()},
            "first quarter": sum(hits["reliability"][:quarter]) / quarter,
            "last quarter": sum(hits["reliability"][-quarter:]) / quarter,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--facts", type=int, default=200)
    args = parser.parse_args()
    warnings_off()
    datasets.disable_progress_bars()
    made = [run(args.facts, seed) for seed in args.seeds]
    for name in made[0]:
        line = f"{name:16}"
        for score in made[0][name]:
            values = [one[name][score] for one in made]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f"  {score} {statistics.mean(values):.3f} ±{spread:.3f}"
        print(line)


if __name__ == "__main__":
    main()
