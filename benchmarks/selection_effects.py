"""What the papers on selections and adapters say will happen, seen small, over seeds.

    .venv/bin/python benchmarks/selection_effects.py [--only NAME ...] [--seeds 0 1 2]

A Llama of two layers reads a language (a Markov chain); then it learns facts, told in texts of other languages. Both
sides of a comparison start from the same network. A line is an effect, with a verdict as in `objective_effects.py`.
"""

from __future__ import annotations

import copy
import random
import tempfile
from typing import Any

import lightning.pytorch as L
import objective_effects
import torch
from objective_effects import IGNORED, Effect, batch_of, llama, loader, nll
from torch import nn

from lightning_peft.callbacks import PEFT, HalfFineTuning, LayerFreezing, LoKI, SliceFine, TransPEFT
from lightning_peft.models import CausalLM

WORDS, KEYS, VALUES = range(4, 24), range(24, 40), range(40, 56)


class Languages:
    """Texts of Markov chains over the same words, and facts told in them."""

    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.chains = (1.5 * torch.randn(4, 20, 20, generator=generator)).softmax(-1).tolist()

    def text(self, language: int, length: int) -> list[int]:
        made = [self.draws.choice(WORDS)]
        while len(made) < length:
            made += self.draws.choices(WORDS, self.chains[language][made[-1] - WORDS[0]])
        return made

    def reading(self, language: int, n: int) -> list[dict[str, Any]]:
        return [{"input_ids": ids, "labels": ids} for ids in (self.text(language, 16) for _ in range(n))]

    def facts(self) -> dict[int, int]:
        return dict(zip(KEYS, self.draws.sample(VALUES, 16)))

    def telling(self, facts: dict[int, int], language: int, n: int) -> list[dict[str, Any]]:
        rows = []
        for key in self.draws.choices(list(facts), k=n):
            ids = [*self.text(language, 5), key, facts[key], *self.text(language, 5)]
            rows.append({"input_ids": ids, "labels": ids})
        return rows


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same rows, where only the facts are learnt."""
    batch = batch_of(rows)
    return {**batch, "labels": torch.where(batch["input_ids"] >= VALUES[0], batch["input_ids"], IGNORED)}


def fit(
    network: nn.Module,
    rows: list[dict[str, Any]],
    steps: int,
    seed: int,
    rate: float,
    callbacks: list[L.Callback] | None = None,
) -> CausalLM:
    """Trains for so many steps."""
    module = CausalLM(network, learning_rate=rate, lr_scheduler="constant")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        limit_val_batches=0,
        callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
        **quiet,
    )
    trainer.fit(module, loader(rows, 16, seed))
    network.eval()
    return module


def start_from(languages: Languages, seed: int) -> nn.Module:
    """It has read the first language, and facts of its own in it, so that it knows all words."""
    base = llama(64, seed)
    fit(base, languages.reading(0, 4096) + languages.telling(languages.facts(), 0, 4096), 800, seed, 3e-3)
    return base


def half_fine_tuning(seed: int) -> list[Effect]:
    """Two stages of facts in two new languages, 300 steps each, all weights or a new half in each stage."""
    languages = Languages(seed)
    base = start_from(languages, seed)
    old = batch_of(languages.reading(0, 512))
    before = nll(base, old).mean()
    stages = [(language, languages.facts()) for language in (1, 2)]
    rows = [languages.telling(facts, language, 4800) for language, facts in stages]
    first, second = (told(languages.telling(facts, language, 256)) for language, facts in stages)
    found = []
    for callbacks in ([], [HalfFineTuning(seed=seed)]):
        network = copy.deepcopy(base)
        for stage in rows:
            fit(network, stage, 300, seed, 1e-3, list(callbacks))
        found.append(
            [float(nll(network, old).mean() - before), *(float(nll(network, t).mean()) for t in (first, second))]
        )
    measures = (
        "rise of the first language's loss after two stages",
        "loss of the first stage's facts after the second",
        "loss of the second stage's facts",
    )
    return [Effect(what, full, half, "lower") for what, full, half in zip(measures, *found)]


def in_place(seed: int) -> list[Effect]:
    """LoKI and SliceFine beside LoRA, 300 steps each: how well the facts are learnt, and what it costs the language."""
    languages = Languages(seed)
    base = start_from(languages, seed)
    old, facts = batch_of(languages.reading(0, 512)), languages.facts()
    before, rows, test = (
        nll(base, old).mean(),
        languages.telling(facts, 1, 4800),
        told(languages.telling(facts, 1, 256)),
    )
    questions = [row["input_ids"] for row in languages.reading(0, 16)]
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    found = {}
    for name, callback, rate in (
        ("LoRA", PEFT(lora), 3e-3),
        ("LoKI", LoKI(30.0, questions=questions), 1e-2),
        ("SliceFine", SliceFine(rank=8, interval=50), 3e-3),
    ):
        network = copy.deepcopy(base)
        fit(network, rows, 300, seed, rate, [callback])
        found[name] = (float(nll(network, test).mean()), float(nll(network, old).mean() - before))
    made = []
    for name in ("LoKI", "SliceFine"):
        made.append(Effect(f"facts' loss, LoRA against {name}", found["LoRA"][0], found[name][0], "lower"))
        made.append(
            Effect(f"rise of the first language's loss, LoRA against {name}", found["LoRA"][1], found[name][1], "lower")
        )
    return made


def trans_peft(seed: int) -> list[Effect]:
    """An adapter on attention, trained on v1 and put on v2, whose feed-forward parts have read another language."""
    languages = Languages(seed)
    v1 = start_from(languages, seed)
    v2 = copy.deepcopy(v1)
    fit(v2, languages.reading(2, 4096), 200, seed, 1e-3, [LayerFreezing(["ffn"])])
    facts = languages.facts()
    rows, test = languages.telling(facts, 1, 19200), told(languages.telling(facts, 1, 512))
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    found = {}
    for side in ("without", "with"):
        network = copy.deepcopy(v1)
        further: list[L.Callback] = [TransPEFT(0.2, 0.1, seed=seed)] if side == "with" else []
        fit(network, rows, 1200, seed, 3e-3, [PEFT(lora), *further])
        adapter = {name: value for name, value in network.state_dict().items() if "lora_" in name}
        updated = CausalLM(copy.deepcopy(v2))
        PEFT(lora).attach(updated)
        updated.model.load_state_dict(adapter, strict=False)
        updated.model.eval()
        on_v1, on_v2 = float(nll(network, test).mean()), float(nll(updated.model, test).mean())
        found[side] = (on_v1, on_v2, on_v2 - on_v1)
    return [
        Effect(f"facts' loss {what}", found["without"][number], found["with"][number], "lower")
        for number, what in enumerate(("on v1", "on v2", "lost by the update"))
    ]


EFFECTS = {"half_fine_tuning": half_fine_tuning, "in_place": in_place, "trans_peft": trans_peft}

if __name__ == "__main__":
    objective_effects.EFFECTS = EFFECTS  # the same table
    objective_effects.main()
