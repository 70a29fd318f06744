"""Answers generated in parallel under the tags of set supervised fine-tuning, scored (paper 33, arXiv 2510.05132)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import lightning.pytorch as L
import torch

from lightning_peft.callbacks.generated_answers import GeneratedAnswers
from lightning_peft.models.generation import continuations
from lightning_peft.objectives.set_supervised import tag_names
from lightning_peft.when_built import is_sharded

#: The last boxed expression of an answer without further braces, and of a trace that ends in a line "Answer: ...".
BOXED = r"\\boxed\{([^{}]*)\}|(?im:^answer:\s*(.+?)\s*$)"


def extracted_answer(text: str, pattern: str = BOXED) -> str | None:
    """The last match of the pattern (its first group that matched), blanks trimmed; None without a match.

    >>> extracted_answer("so \\\\boxed{3}, no, \\\\boxed{ 4 }")
    '4'
    """
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    groups = [group for group in found[-1].groups() if group is not None]
    return (groups[0] if groups else found[-1].group()).strip()


def consensus(answers: list[str | None]) -> str | None:
    """The answer that most gave, the one given first among equals; those without one have no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer]) if votes else None  # a Counter keeps the order of arrival


@torch.no_grad()
def generate_under_tags(
    module: Any, prompts: list[str], beginnings: list[str], generation: dict[str, Any], batch_size: int = 8
) -> list[str]:
    """What the network writes behind each prompt and its beginning, special tokens left out.

    Args:
        module: A `CausalLM` with a tokenizer.
        prompts: As the network is to read them.
        beginnings: What stands behind each, such as `<think2>` and a newline.
        generation: Arguments of `generate`.
        batch_size: Prompts at once.
    """
    tokenizer = module.tokenizer
    options = {"synced_gpus": is_sharded(module), **generation}
    texts: list[str] = []
    for begin in range(0, len(prompts), batch_size):
        part = slice(begin, begin + batch_size)
        ids = [tokenizer(a + b)["input_ids"] for a, b in zip(prompts[part], beginnings[part])]
        if tokenizer.eos_token_id is not None:
            ids = [one[:-1] if len(one) > 1 and one[-1] == tokenizer.eos_token_id else one for one in ids]
        texts += continuations(module, ids, options)
    return texts


class ParallelTagGeneration(GeneratedAnswers):
    """Pass@1 and Cons@k on questions with known answers, after each validation and test.

    The k answers to a question are spread evenly over the tags. Cons@k counts the questions whose most frequent answer
    is right; Pass@1 is the share of right answers among those of one tag (`pass_tag`; the paper prompts the one that
    was matched to the most different traces, `<think1>` in its released network). Logged as `val_pass@1` and
    `val_cons@k`.

    Args:
        questions: Rows with `prompt` (a text, or messages) and `answer`.
        tags: N, for tags `<think1>` ... `<thinkN>`, or their names.
        tag_text: What stands behind the prompt, with `{tag}` in it.
        samples: k, a multiple of the number of tags; by default one for each.
        pass_tag: Number of the tag of Pass@1, from 1.
        answer_pattern: Regular expression whose last match in a generated text is its answer.
        generation: Arguments of `generate`; by default temperature 0.7, top-p 0.95 and at most 2,048 new tokens.
        batch_size: Texts generated at once.
        seed: Seed of the samples; the run's own random numbers are left alone.

    Raises:
        ValueError: An argument is out of range, or the module has no tokenizer that knows the tags.
    """

    def __init__(
        self,
        questions: list[dict[str, str | Any]],
        tags: int | list[str] = 6,
        tag_text: str = "{tag}\n",
        samples: int | None = None,
        pass_tag: int = 1,
        answer_pattern: str = BOXED,
        generation: dict[str, Any] | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(questions, batch_size)
        self.tags = tag_names(tags)
        self.samples = len(self.tags) if samples is None else samples
        if self.samples < 1 or self.samples % len(self.tags):
            raise ValueError(f"samples={samples} must be a multiple of the {len(self.tags)} tags, to spread evenly.")
        if not 1 <= pass_tag <= len(self.tags):
            raise ValueError(f"pass_tag={pass_tag} must be in [1, {len(self.tags)}].")
        if "{tag}" not in tag_text:
            raise ValueError(f"tag_text={tag_text!r} must have {{tag}} in it.")
        self.tag_text, self.pass_tag = tag_text, pass_tag
        self.pattern, self.seed = answer_pattern, seed
        self.score_names = ("pass@1", f"cons@{self.samples}")
        self.generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 2048}
        self.generation |= generation or {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(tags=self.tags, samples=self.samples, pass_tag=self.pass_tag)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        tokenizer: Any = pl_module.tokenizer
        missing = [tag for tag in self.tags if tag not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"ParallelTagGeneration: the tokenizer does not know the tags {missing}: train with "
                "SetSupervisedMixin, or name tags that it has."
            )

    def scores(self, module: Any, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        numbers = self.numbers(rank, ranks)
        rows = [self.questions[number % len(self.questions)] for number in numbers]
        prompts = [self._rendered(module.tokenizer, row["prompt"]) for row in rows]
        tags = self.tags * (self.samples // len(self.tags))
        every = [prompt for prompt in prompts for _ in tags]
        beginnings = [self.tag_text.format(tag=tag) for _ in prompts for tag in tags]
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed * 1_000_003 + rank)
            texts = generate_under_tags(module, every, beginnings, self.generation, self.batch_size)
        total, pass_tag = torch.zeros(3, dtype=torch.float64), self.tags[self.pass_tag - 1]
        for place, (number, row) in enumerate(zip(numbers, rows)):
            if number < len(self.questions):
                own = texts[place * len(tags) : (place + 1) * len(tags)]
                answers = [extracted_answer(text, self.pattern) for text in own]
                single = [answer == row["answer"].strip() for answer, tag in zip(answers, tags) if tag == pass_tag]
                total += torch.tensor([sum(single) / len(single), consensus(answers) == row["answer"].strip(), 1])
        return total

    def _rendered(self, tokenizer: Any, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
