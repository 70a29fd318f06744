"""Long-short mixture (LS-Mixture, paper 108, arXiv 2505.03469): every long chain of thought also in a short version.

A rewriter shortens each chain and keeps its structure: the order of its steps and its turning points stay, repetition
goes. Trained is on the union

    D = {(x, r_long, y)} + {(x, r_short, y)}.

In the published rows (`VLyb/s1K-mix`) the question says which version follows, and asks at inference for something in
between; `mode_instruction=False` gives the plain union. The checks on a short version are ours, and so is the
rewriter's instruction, which follows the paper's description. The paper's rewriter is Qwen2.5-72B-Instruct.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from random import Random
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, tensor
from torchmetrics import Metric

from lightning_peft.datamodules.answers import prompt_ids
from lightning_peft.datamodules.model_answers import ModelAnswersData
from lightning_peft.datamodules.rewriting import Rewriting, Row, exchanges, mapped, with_exchanges
from lightning_peft.datamodules.sources import Source

#: What the question begins with, for each version and for what is asked at inference.
MODES = {
    "long": "Answer the problem with a detailed thinking process:\n\n",
    "short": "Answer the problem with a brief thinking process:\n\n",
    "balanced": "Answer the problem with an appropriate thinking process, between detailed and brief:\n\n",
}
REQUEST = (
    "Below are a problem and a long chain of thought that solves it. Write the chain anew, much shorter. Keep its "
    "logical order, every step that the solution needs, and the moments at which the thought turns (an error noticed, "
    "an idea found). Leave out repetition, detours that lead nowhere and checks that change nothing. Do not change any "
    "result or the final answer. Reply with the shortened chain alone.\n\n"
    "Problem:\n{question}\n\nChain of thought:\n{reasoning}"
)

_OPERAND = r"(?:(?<![A-Za-z])(?:\d+(?:[.,]\d+)*[A-Za-z]?|[A-Za-z]\d*)(?![A-Za-z])|\([^()=]*\))"
_EXPRESSION = rf"-?{_OPERAND}(?:\s*[-+*/^]\s*{_OPERAND})*"
_EQUATION = re.compile(rf"{_EXPRESSION}\s*=\s*{_EXPRESSION}")
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_answer(text: str) -> str:
    """What a text comes to: its last boxed expression, else its last number, else all of it.

    Args:
        text: An answer or a chain.

    >>> final_answer(r"so \\boxed{3}, by 2 ways"), final_answer("2 + 3 = 5."), final_answer(" Paris. ")
    ('3', '5', 'paris')
    """
    boxed, numbers = _BOXED.findall(text), _NUMBER.findall(text)
    if boxed:
        return re.sub(r"\s", "", boxed[-1])
    return numbers[-1].replace(",", "") if numbers else text.strip().rstrip(".").casefold()


def steps(text: str) -> list[str]:
    """The equations of a chain in order, without blanks; where it has none, its numbers.

    Args:
        text: A chain.

    >>> steps("First 2 + 3 = 5, and then 5*2=10."), steps("4 and 9")
    (['2+3=5', '5*2=10'], ['4', '9'])
    """
    found = [re.sub(r"\s", "", equation) for equation in _EQUATION.findall(text)]
    return found or [number.replace(",", "") for number in _NUMBER.findall(text)]


def why_rejected(reasoning: str, short: str, answer: str) -> str | None:
    """Why a short version is no structure-preserving one of its chain, in a word; `None` if it is one.

    - "empty": nothing was written, or not to its end;
    - "longer": it is as long as the chain, or longer;
    - "answer": the chain comes to the answer, and the short version does not;
    - "order": steps that both have stand in another order.

    Args:
        reasoning: The long chain.
        short: Its short version.
        answer: The answer that stands behind the chain.
    """
    if not short.strip():
        return "empty"
    if len(short.strip()) >= len(reasoning.strip()):
        return "longer"
    right = final_answer(answer)
    if final_answer(reasoning) == right:
        if final_answer(short) != right:
            return "answer"
    elif _states(reasoning, right) and not _states(short, right):
        return "answer"
    taken = steps(reasoning)
    shared = [step for step in dict.fromkeys(steps(short)) if step in set(taken)]
    rest = iter(taken)
    if not all(step in rest for step in shared):  # a subsequence: each is looked for behind the one before it
        return "order"
    return None


def _states(text: str, answer: str) -> bool:
    numbers = [number.replace(",", "") for number in _NUMBER.findall(text)]
    return answer in numbers if _NUMBER.fullmatch(answer) else answer in text.casefold()


class ChainVersionTransform(Rewriting):
    """One version of a row: with its long chain, with its short one, or asked in between.

    Args:
        version: "long", "short", which takes the chain of `short_column`, or "balanced", for what is asked at
            inference (the long chain stays behind it).
        short_column: The column with the short chain.
        mode_instruction: Begin the question with which version follows.
        think_marks: What stands before and behind a chain.

    Raises:
        ValueError: An unknown version; for a row, no chain, or no short one.
    """

    def __init__(
        self,
        version: str,
        short_column: str = "short",
        mode_instruction: bool = True,
        think_marks: tuple[str, str] = ("<think>", "</think>"),
    ) -> None:
        if version not in MODES:
            raise ValueError(f"version={version!r} is not known: use one of {', '.join(map(repr, MODES))}.")
        self.version, self.short_column, self.mode_instruction = version, short_column, mode_instruction
        self.think_marks = think_marks

    def rewrite(self, row: Row, epoch: int) -> Row:
        question, response = question_and_response(row)
        chain, _ = split_chain(response, self.think_marks)
        if self.version == "short":
            short = str(row.get(self.short_column) or "").strip()
            if not short:
                raise ValueError(f"a row has no short chain in its column {self.short_column!r}.")
            response = response.replace(chain, short, 1)
        if self.mode_instruction:
            question = MODES[self.version] + question
        return with_exchanges(row, [(question, response)])


class LongShortMixtureData(ModelAnswersData):
    """Questions with long chains of thought, and each also with a short version of the chain.

    Short versions come with the data in a column, or a network writes them once, in `setup`, by all ranks, kept as
    those of `SelfDistillationData` are. One that fails a check is left out (see `why_rejected`); its long chain stays.
    Both versions of a question lie in the same split. Test rows are asked in between and keep the long chain.

    Args:
        data: As for `InstructionData`: each answer is a chain between `think_marks`, and the answer proper behind it.
        short_column: The column with short versions already written; rows that have none are rewritten.
        ratio: Short rows for each long one, exactly; by default the plain union.
        mode_instruction: Begin questions with which version follows.
        think_marks: What stands before and behind a chain.
        generation: Arguments of `generate` for the rewriter; by default greedy, at most 1,024 new tokens.
        **kwargs: Further arguments of `ModelAnswersData` (`model` names the rewriter) and `InstructionData`.

    Raises:
        ValueError: Rows without a chain; questions in two splits; no short version passes; or too few for the ratio.
    """

    cache_name = "long_short_mixture"

    def __init__(
        self,
        data: Source,
        short_column: str = "short",
        ratio: float | None = None,
        mode_instruction: bool = True,
        think_marks: tuple[str, str] = ("<think>", "</think>"),
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        generation = {"max_new_tokens": 1024, "do_sample": False, **(generation or {})}
        super().__init__(data=data, generation=generation, **kwargs)
        if ratio is not None and not ratio > 0:
            raise ValueError(f"ratio={ratio} must be above 0: short rows for each long one.")
        self.short_column, self.ratio, self.mode_instruction = short_column, ratio, mode_instruction
        self.think_marks = (think_marks[0], think_marks[1])

    def read(self) -> dict[str, Any]:
        splits = super().read()
        seen: dict[str, str] = {}
        for split in ("test", "validation", "train"):
            asked = {_digest(question_and_response(row)[0]) for row in splits.get(split, [])}
            for other in {seen[question] for question in asked if question in seen}:
                twice = sum(seen.get(question) == other for question in asked)
                raise ValueError(
                    f"{twice} questions stand in both the {split} and the {other} split: one version of a chain would "
                    "be learnt and another tested. Leave them out of one side."
                )
            seen.update(dict.fromkeys(asked, split))
        return splits

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        versions = {version: self._version(version) for version in MODES}
        if split == "test":
            return mapped(rows, versions["balanced"], versions["balanced"].fingerprint())
        rows = list(rows)
        chains = [split_chain(question_and_response(row)[1], self.think_marks) for row in rows]
        shorts = self._short_chains(rows, [chain for chain, _ in chains])
        reasons = [why_rejected(chain, short, answer) for (chain, answer), short in zip(chains, shorts)]
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        told = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(filter(None, reasons)).items()))
        rank_zero_info(f"{split} data: {len(kept)} of {len(rows)} chains also in short (the others: {told or 'none'}).")
        if not kept:
            raise ValueError(
                f"none of {len(rows)} short versions of the {split} chains passes ({told}): give a better rewriter "
                "with model=, room for longer answers with generation=, or short chains in a column."
            )
        long, short = mixture(list(range(len(rows))), kept, self.ratio if split == "train" else None, self.seed)
        made = [versions["long"](rows[i]) for i in long]
        made += [versions["short"]({**rows[i], self.short_column: shorts[i]}) for i in short]
        return datasets.Dataset.from_list([{k: v for k, v in row.items() if k != self.short_column} for row in made])

    def _version(self, version: str) -> ChainVersionTransform:
        return ChainVersionTransform(version, self.short_column, self.mode_instruction, self.think_marks)

    def _short_chains(self, rows: list[Row], chains: list[str]) -> list[str]:
        """The short chain of each row: its own, or the rewriter's; empty where that did not come to an end."""
        given = [str(row.get(self.short_column) or "").strip() for row in rows]
        missing = [i for i, short in enumerate(given) if not short]
        if not missing:
            return given
        template: Any = self.row_options["chat_template"]
        conversational = bool(template or getattr(self.tokenizer, "chat_template", None))
        ids = {}
        for i in missing:
            request = REQUEST.format(question=question_and_response(rows[i])[0], reasoning=chains[i])
            turns: Any = [{"role": "user", "content": request}] if conversational else f"{request}\n\nShort chain:\n"
            ids[i] = prompt_ids(self.tokenizer, turns, template)
        room = getattr(self.network().config, "max_position_embeddings", None) or float("inf")
        asked = [i for i in missing if len(ids[i]) + self.generation.get("max_new_tokens", 0) <= room]
        for i, one in zip(asked, self.answers([ids[i] for i in asked], self.generation)):
            # A rewriter that thinks itself: only what it says then. A chain cut off in the middle is no chain.
            given[i] = one["answer"].rpartition(self.think_marks[1])[2].strip() if one["finished"] else ""
        return given


def split_chain(response: str, think_marks: tuple[str, str] = ("<think>", "</think>")) -> tuple[str, str]:
    """The chain of thought and the answer behind it.

    Args:
        response: The whole response.
        think_marks: What stands before and behind the chain.

    Raises:
        ValueError: There is no chain, or no answer behind it.

    >>> split_chain("<think>2 + 2 = 4</think> 4")
    ('2 + 2 = 4', '4')
    """
    begin, end = think_marks
    _, first, rest = response.partition(begin)
    chain, second, answer = rest.partition(end)
    if not (first and second and chain.strip() and answer.strip()):
        raise ValueError(
            f"a response has no chain between {begin!r} and {end!r} with an answer behind: {response[:60]!r}. Say how "
            "the data mark their chains with think_marks=."
        )
    return chain.strip(), answer.strip()


def mixture(long: list[int], short: list[int], ratio: float | None, seed: int = 0) -> tuple[list[int], list[int]]:
    """Which long and which short rows are learnt from: all, or as many as the ratio says, drawn by the seed.

    The most long rows that have enough short ones: `n` of them and `round(ratio * n)`.

    Args:
        long: Numbers of the long rows.
        short: Numbers of the rows with a short version.
        ratio: Short rows for each long one; `None` for all of both.
        seed: Seed of the draw.

    Raises:
        ValueError: There are too few short versions for a single long row.

    >>> [len(part) for part in mixture(list(range(10)), list(range(8)), 0.5)]
    [10, 5]
    >>> [len(part) for part in mixture(list(range(10)), list(range(8)), 2)]
    [4, 8]
    """
    if ratio is None:
        return long, short
    n = next((n for n in range(len(long), 0, -1) if round(ratio * n) <= len(short)), 0)
    if not n or not round(ratio * n):
        raise ValueError(
            f"ratio={ratio} cannot be met by {len(long)} long chains and {len(short)} short versions: give more rows, "
            "or another ratio."
        )
    draws = Random(seed)
    return sorted(draws.sample(long, n)), sorted(draws.sample(short, round(ratio * n)))


def question_and_response(row: Row) -> tuple[str, str]:
    """The one question of a row and the response to it.

    Raises:
        ValueError: Several.
    """
    pairs = exchanges(row)
    if len(pairs) > 1:
        raise ValueError(f"a row has {len(pairs)} responses: a chain of thought answers one question.")
    return pairs[0]


def _digest(question: str) -> str:
    return hashlib.sha256(json.dumps(question.casefold().split()).encode()).hexdigest()


class ReasoningEfficiency(Metric):
    """How long responses are, how often they are right, and how much accuracy a thousand tokens bring."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens", "correct", "count"):
            self.add_state(name, tensor(0), dist_reduce_fx="sum")

    def update(self, lengths: Tensor, correct: Tensor) -> None:
        """Adds responses.

        Args:
            lengths: Tokens of each, [responses].
            correct: Whether each is right, alike.
        """
        self.tokens += lengths.sum()
        self.correct += correct.bool().sum()
        self.count += lengths.numel()

    def compute(self) -> dict[str, Tensor]:
        """`mean_length` in tokens, `accuracy`, and `accuracy_per_1000_tokens`."""
        tokens: Any = self.tokens
        correct: Any = self.correct
        length, accuracy = tokens / self.count, correct / self.count
        return {"mean_length": length, "accuracy": accuracy, "accuracy_per_1000_tokens": 1000 * accuracy / length}
