"""Answers generated in parallel under the tags of set supervised fine-tuning, scored (paper 33, arXiv 2510.05132)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import lightning.pytorch as L
import torch

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
    options = {"pad_token_id": tokenizer.pad_token_id, "synced_gpus": is_sharded(module), **generation}
    texts: list[str] = []
    for begin in range(0, len(prompts), batch_size):
        part = slice(begin, begin + batch_size)
        ids = [tokenizer(a + b)["input_ids"] for a, b in zip(prompts[part], beginnings[part])]
        if tokenizer.eos_token_id is not None:
            ids = [one[:-1] if len(one) > 1 and one[-1] == tokenizer.eos_token_id else one for one in ids]
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        given = tokenizer.pad([{"input_ids": one} for one in ids], return_tensors="pt").to(module.device)
        tokenizer.padding_side = side
        made = module.model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], **options)
        texts += tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


class ParallelTagGeneration(L.Callback):
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
        questions: list[dict[str, Any]],
        tags: int | list[str] = 6,
        tag_text: str = "{tag}\n",
        samples: int | None = None,
        pass_tag: int = 1,
        answer_pattern: str = BOXED,
        generation: dict[str, Any] | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.tags = tag_names(tags)
        self.samples = len(self.tags) if samples is None else samples
        if not questions or any("prompt" not in row or "answer" not in row for row in questions):
            raise ValueError("questions must be rows with 'prompt' and 'answer', at least one.")
        if self.samples < 1 or self.samples % len(self.tags):
            raise ValueError(f"samples={samples} must be a multiple of the {len(self.tags)} tags, to spread evenly.")
        if not 1 <= pass_tag <= len(self.tags):
            raise ValueError(f"pass_tag={pass_tag} must be in [1, {len(self.tags)}].")
        if "{tag}" not in tag_text:
            raise ValueError(f"tag_text={tag_text!r} must have {{tag}} in it.")
        # A YAML's "35" may arrive as a number.
        self.questions = [{**row, "answer": str(row["answer"]).strip()} for row in questions]
        self.tag_text, self.pass_tag = tag_text, pass_tag
        self.pattern, self.batch_size, self.seed = answer_pattern, batch_size, seed
        self.generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 2048}
        self.generation |= generation or {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(tags=self.tags, samples=self.samples, pass_tag=self.pass_tag)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        tokenizer: Any = getattr(pl_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("ParallelTagGeneration writes text: it needs a module with a tokenizer, such as CausalLM.")
        missing = [tag for tag in self.tags if tag not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"ParallelTagGeneration: the tokenizer does not know the tags {missing}: train with "
                "SetSupervisedMixin, or name tags that it has."
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        right = self.scores(pl_module, trainer.global_rank, trainer.world_size)
        if trainer.world_size > 1:
            right = trainer.strategy.reduce(right.to(pl_module.device), reduce_op="sum").cpu()
        pass_1, cons_k = (right[:2] / right[2]).tolist()
        pl_module.log(f"{stage}_pass@1", pass_1, rank_zero_only=False, sync_dist=False)
        pl_module.log(f"{stage}_cons@{self.samples}", cons_k, rank_zero_only=False, sync_dist=False)

    def scores(self, module: Any, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        """Sums over this rank's questions of their Pass@1 and Cons@k, and how many they are; [3] in float64.

        Args:
            module: The module; in evaluation mode.
            rank: This process.
            ranks: Processes that share the questions.
        """
        # Ranks generate equally often, for under FSDP2 every forward is collective; what is over is not scored.
        count = -(-len(self.questions) // ranks)
        numbers = [rank + place * ranks for place in range(count)]
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
                single = [answer == row["answer"] for answer, tag in zip(answers, tags) if tag == pass_tag]
                total += torch.tensor([sum(single) / len(single), consensus(answers) == row["answer"], 1])
        return total

    def _rendered(self, tokenizer: Any, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
