"""Question-free fine-tuning (QFFT, paper 68, arXiv 2506.12860): long chains of thought are learnt without questions.

A training row is the response alone. No system text, no user's turn and no header stand before it, so that the short
answers that the network gives to questions are left as they are; what it learns of long reasoning comes up where a
short answer goes wrong. Asked is by the ordinary chat template.

The published code (LWL-cpu/Question-Free-Fine-Tuning) empties the template's slots and relies on data whose question is
empty; here the question is dropped. As there, no end is put behind the response unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.datamodules.chat_template import IGNORED
from lightning_peft.datamodules.rewriting import Rewriting, RewrittenData, Row, exchanges, leading_tokens
from lightning_peft.datamodules.sources import Source

#: Words that border on a second thought; the paper names "wait" and prints no further list.
REFLECTION = ("wait",)


class QuestionFreeTransform(Rewriting):
    """The tokens of a row's response and nothing else, all learnt; the chat template is not used.

    Without a token that the tokenizer puts in front of texts (such as a beginning-of-text token), nothing predicts the
    response's first token: n tokens give n - 1 labels to learn.

    Args:
        tokenizer: A transformers tokenizer.
        add_eos: Put an end-of-text token behind, learnt too.

    Raises:
        ValueError: For a row, no response, an empty one, or several.
    """

    def __init__(self, tokenizer: Any, add_eos: bool = False) -> None:
        self.tokenizer, self.add_eos = tokenizer, add_eos
        self.leading = leading_tokens(tokenizer)

    def rewrite(self, row: Row, epoch: int) -> Row:
        pairs = exchanges(row)
        if len(pairs) > 1:
            raise ValueError(
                f"a row has {len(pairs)} responses: without its question, which one is a text of its own? Give a row "
                "for each."
            )
        response = pairs[0][1]
        if not response.strip():
            raise ValueError("a row's response is empty: there is nothing to learn without its question.")
        ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        if self.add_eos and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return {"input_ids": self.leading + ids, "labels": [IGNORED] * len(self.leading) + ids}


class QuestionFreeData(RewrittenData):
    """Instruction data whose training rows are responses without their questions.

    Validation and test rows keep their questions and the chat template, for so the network will be asked.

    Args:
        data: As for `InstructionData`: conversations of one response, or prompts with completions.
        add_eos: Put an end-of-text token behind each response.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: As `QuestionFreeTransform`.
    """

    def __init__(self, data: Source, add_eos: bool = False, **kwargs: Any) -> None:
        super().__init__(data=data, **kwargs)
        self.add_eos = add_eos

    def rewriting(self, split: str) -> QuestionFreeTransform | None:
        return QuestionFreeTransform(self.tokenizer, self.add_eos) if split == "train" else None


def is_long_reasoning(response: str, keywords: tuple[str, ...] = REFLECTION) -> bool:
    """Whether a response thinks twice: it holds a word of reflection, in any case.

    Args:
        response: The response.
        keywords: Words of reflection.

    >>> is_long_reasoning("So 4. Wait, no."), is_long_reasoning("The waiter brings 4.")
    (True, False)
    """
    return any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in keywords)


class ReasoningAdaptabilityKappa(Metric):
    """Cohen's kappa between "short reasoning solves the question" and "the tuned network reasons shortly".

        kappa = (p_o - p_e) / (1 - p_e),   p_e from the marginals,

    the mean over the samples taken of each question (16 at temperature 0.6 in the paper). 1 is a network that thinks
    twice where it has to and only there. As in scikit-learn, a sample whose two columns are both constant and equal
    gives NaN.

    Args:
        samples: Samples of each question.
        keywords: Words by which a long chain is known; by default "wait" alone.
        is_long: In place of keywords, a function from a response to whether it is long.
    """

    higher_is_better = True

    def __init__(
        self, samples: int = 1, keywords: list[str] | None = None, is_long: Callable[[str], bool] | None = None
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1.")
        words = REFLECTION if keywords is None else tuple(keywords)
        self.is_long = is_long or partial(is_long_reasoning, keywords=words)
        # How often (solvable, short) takes each pair of values, a table for each sample.
        self.add_state("tables", torch.zeros(samples, 2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, solvable: Tensor, responses: list[list[str]]) -> None:
        """Adds questions.

        Args:
            solvable: Whether the untuned network with short chains answers each question, [questions].
            responses: The tuned network's responses to each question, [questions][samples].
        """
        tables: Any = self.tables
        if len(responses) != len(solvable) or any(len(own) != len(tables) for own in responses):
            sizes = sorted({len(own) for own in responses})
            raise ValueError(
                f"{len(solvable)} questions have {len(responses)} lists of {sizes} responses: give each question "
                f"samples={len(tables)} of them."
            )
        short = torch.tensor([[not self.is_long(one) for one in own] for own in responses]).long()
        cells = 2 * solvable.cpu().long()[:, None] + short
        tables += torch.nn.functional.one_hot(cells, 4).sum(0).view(-1, 2, 2).to(tables)

    def compute(self) -> Tensor:
        tables: Any = self.tables
        share = tables / tables.sum((1, 2), keepdim=True)
        observed = share.diagonal(dim1=1, dim2=2).sum(1)
        expected = (share.sum(1) * share.sum(2)).sum(1)
        return ((observed - expected) / (1 - expected)).mean()


def length_change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How much shorter responses have become, both ways to say it for several tasks.

    The paper's -50.5% is the mean of the tasks' relative changes; in tokens the same three tasks fall by 35%.

    Args:
        before: Mean response length of each task.
        after: The same after tuning.

    Returns:
        `mean_of_changes`, the mean over tasks of after / before - 1, and `change_of_means`, that of the mean lengths.

    >>> length_change({"easy": 4, "hard": 12}, {"easy": 2, "hard": 12})
    {'mean_of_changes': -0.25, 'change_of_means': -0.125}
    """
    if before.keys() != after.keys() or not before:
        raise ValueError(f"the tasks before, {sorted(before)}, must be those after, {sorted(after)}, and at least one.")
    changes = [after[task] / before[task] - 1 for task in before]
    total = sum(after.values()) / sum(before.values()) - 1
    return {"mean_of_changes": sum(changes) / len(changes), "change_of_means": total}
