"""How an edited network answers: reliability, generalisation and locality (paper 34, `eval_edit_metric.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch

from lightning_peft.callbacks.generated_answers import GeneratedAnswers
from lightning_peft.callbacks.parallel_tag_generation import generate_under_tags
from lightning_peft.callbacks.question_answering import exact_match
from lightning_peft.datamodules.edits import as_edit
from lightning_peft.network_modes import evaluation_mode

SCORES = ("reliability", "generalisation", "locality")


class EditEvaluation(GeneratedAnswers):
    """Asks after each validation and test; logs `val_reliability`, `val_generalisation`, `val_locality` (`test_...`).

    Answers are generated greedily, cut at the first "." or newline, and compared lower-cased, without articles and
    punctuation. Reliability: the share of edits whose prompt gives the new target; generalisation: the same for their
    rephrased prompts; locality: the share of unrelated prompts that are answered as before the fit (the authors use
    general benchmarks instead). An edit without a rephrased or unrelated prompt does not count there.

    Args:
        edits: Rows as for `EditData`.
        max_new_tokens: Tokens generated.
        batch_size: Prompts at once.

    Raises:
        ValueError: A row is no edit, or the module has no tokenizer.
    """

    score_names = SCORES

    def __init__(self, edits: list[dict[str, Any]], max_new_tokens: int = 32, batch_size: int = 8) -> None:
        self.edits = [as_edit(row) for row in edits]
        super().__init__([{"prompt": row["prompt"], "answer": row["target_new"]} for row in self.edits], batch_size)
        self.generation = {"do_sample": False, "max_new_tokens": max_new_tokens}
        self.before: list[str | None] | None = None  # answers to the unrelated prompts before the fit

    @property
    def state_key(self) -> str:
        return self._generate_state_key(edits=len(self.edits))

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before is None:  # not resumed
            self.before = self.answers(pl_module, "locality")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before is None:  # without a fit the network is its own base
            self.before = self.answers(pl_module, "locality")

    def answers(self, module: Any, column: str) -> list[str | None]:
        """What the network answers to every edit's prompt of a kind; `None` where there is none.

        Args:
            module: A `CausalLM` with a tokenizer.
            column: "prompt", "rephrase" or "locality".
        """
        asked = [row[column] for row in self.edits if row[column] is not None]
        with evaluation_mode(module.model), torch.no_grad():
            texts = generate_under_tags(module, asked, [""] * len(asked), self.generation, self.batch_size)
        made = iter([first_sentence(text) for text in texts])
        return [None if row[column] is None else next(made) for row in self.edits]

    def scores(self, module: Any, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        # On every rank all of them, so that a sharded network's forwards are the same.
        found = self.hits(module, self.before or [None] * len(self.edits))
        return torch.tensor([*(mean_of(found[name]) for name in SCORES), 1.0], dtype=torch.float64)

    def hits(self, module: Any, before: Sequence[str | None]) -> dict[str, list[bool]]:
        """Which prompts are answered as they should be, by score."""
        targets = [row["target_new"] for row in self.edits]
        made = {}
        for name, column, wanted in zip(SCORES, ("prompt", "rephrase", "locality"), (targets, targets, before)):
            pairs = zip(self.answers(module, column), wanted)
            made[name] = [exact_match(a, b) for a, b in pairs if a is not None and b is not None]
        return made

    def compare(self, edited: Any, base: Any) -> dict[str, float]:
        """All three scores of an edited module beside its base, as for `sweep_locations`."""
        found = self.hits(edited, self.answers(base, "locality"))
        return {name: mean_of(found[name]) for name in SCORES}


def first_sentence(text: str) -> str:
    """Up to the first "." or newline behind its beginning.

    >>> first_sentence(" Rome. It is"), first_sentence("Rome\\nIt")
    ('Rome', 'Rome')
    """
    return re.split(r"[.\n]", text.strip(), maxsplit=1)[0].strip()


def mean_of(hits: list[bool]) -> float:
    """Share of hits; nan of none."""
    return sum(hits) / len(hits) if hits else float("nan")
