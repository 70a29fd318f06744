"""Short answers generated and scored by exact match and F1 of words, as for SQuAD and for CaMeLS (paper 81)."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import torch

from lightning_peft.callbacks.generated_answers import GeneratedAnswers
from lightning_peft.callbacks.parallel_tag_generation import generate_under_tags


def normalised_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks.

    >>> normalised_answer("The  Cat, a hat!")
    'cat hat'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truth: str, prefix: bool = False) -> bool:
    """Whether the normalised answers are equal; with `prefix`, as far as the true one goes.

    >>> exact_match("Paris, France", "paris"), exact_match("Paris, France", "paris", prefix=True)
    (False, True)
    """
    answer, truth = normalised_answer(answer), normalised_answer(truth)
    return (answer[: len(truth)] if prefix else answer) == truth


def word_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the normalised answer's words.

    >>> word_f1("the big red car", "a red car")
    0.8
    """
    own, true = normalised_answer(answer).split(), normalised_answer(truth).split()
    common = sum((Counter(own) & Counter(true)).values())
    return 2 * common / (len(own) + len(true)) if common else 0.0


class QuestionAnswering(GeneratedAnswers):
    """Asks questions after each validation and test; logs `val_f1` and `val_exact_match` (`test_...`).

    Args:
        questions: Rows with `prompt` (a text) and `answer`.
        prefix_match: Of an answer only as many characters count as the true one has, as in the published CaMeLS code.
        generation: Arguments of `generate`; by default a beam search of 12 with at most 16 new tokens. (The paper's is
            a diverse one in 4 groups, which transformers 5 has on its hub only.)
        batch_size: Questions at once.

    Raises:
        ValueError: Questions lack a column, or the module has no tokenizer.
    """

    def __init__(
        self,
        questions: list[dict[str, str | Any]],
        prefix_match: bool = False,
        generation: dict[str, Any] | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(questions, batch_size)
        self.prefix_match = prefix_match
        self.generation = {"do_sample": False, "num_beams": 12, "max_new_tokens": 16, **(generation or {})}

    score_names = ("exact_match", "f1")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(questions=len(self.questions), prefix_match=self.prefix_match)

    def scores(self, module: Any, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        numbers = self.numbers(rank, ranks)
        prompts = [self.questions[number % len(self.questions)]["prompt"] for number in numbers]
        answers = generate_under_tags(module, prompts, [""] * len(prompts), self.generation, self.batch_size)
        total = torch.zeros(3, dtype=torch.float64)
        for number, answer in zip(numbers, answers):
            if number < len(self.questions):
                truth = self.questions[number]["answer"]
                match = exact_match(answer, truth, self.prefix_match)
                total += torch.tensor([float(match), word_f1(answer, truth), 1.0])
        return total
