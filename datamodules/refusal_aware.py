"""Refusal-aware tuning (R-Tuning, paper 19, arXiv 2311.09677): learn to say what one does not know.

The network is asked every training question before it is trained. Then (mode "unsure", the default) it learns

    Question: q Answer: a. Are you sure you accurately answered the question based on your internal knowledge?

with " I am sure." behind where its answer held the right one, and " I am unsure." where not; the right answer stands in
both. Mode "unknown" answers with a refusal instead. Mode "uncertain" (R-Tuning-U) needs no right answers: of several
samples for each question it takes the entropy, and the lower half of the questions is "sure".

Where the published code (shizhediao/R-Tuning) differs. It learns all tokens (`loss_on="all"`); the paper, the answer
and the certainty. Of an answer without a period it loses the last character, and its probe lacks the blank after
"Question:". Its confidence divides by zero for an empty answer (here 0), and it compares "sure" and "unsure" by their
first tokens as words alone (here as they stand in the sentence). `run_pararel.py` forgets all questions but the last in
mode "uncertain". The refusals are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAveragePrecision

from lightning_peft.datamodules.answers import choice_ids, generation_options, prompt_ids, score_choices
from lightning_peft.datamodules.chat_template import as_messages, tokenize_parts
from lightning_peft.datamodules.model_answers import ModelAnswersData
from lightning_peft.datamodules.rewriting import Rewriting, Row, exchanges, mapped
from lightning_peft.datamodules.sources import Source
from lightning_peft.models.generation import left_padded

MODES = ("unsure", "unknown", "uncertain")
LOSS_ON = ("answer", "all")
ASKED = "Are you sure you accurately answered the question based on your internal knowledge?"
CERTAINTY = {True: "I am sure.", False: "I am unsure."}
#: As many as the published list has.
REFUSALS = (
    "I do not know.",
    "I don't know the answer to that.",
    "I am not certain about this.",
    "I cannot answer this with confidence.",
    "This is not something I know.",
    "I have no reliable knowledge of this.",
    "The answer is not known to me.",
    "I would only be guessing.",
    "That is beyond what I know.",
    "I am unable to say.",
    "I have not learnt this.",
    "I could not tell you for sure.",
    "My knowledge does not reach this far.",
    "I lack the facts to answer.",
    "No answer that I could give would be reliable.",
    "I must leave this question open.",
)


def prompt_of(question: str) -> str:
    """What stands before an answer.

    Args:
        question: The question.
    """
    return f"Question: {question} Answer:"


def first_sentence(answer: str, gold: str = "") -> str:
    """An answer up to its first period; the whole where it has none, or where the right answer has one itself.

    Args:
        answer: What the network said.
        gold: The right answer.

    >>> first_sentence(" Paris. It is in France."), first_sentence(" Paris"), first_sentence(" 3.14 or so.", "3.14")
    ('Paris', 'Paris', '3.14 or so.')
    """
    return (answer if "." in gold else answer.partition(".")[0]).strip()


def answer_entropy(answers: Sequence[str]) -> float:
    """The entropy of the answers' histogram, in nats.

    Args:
        answers: Samples to one question.

    >>> answer_entropy(["a"] * 5), round(answer_entropy(["a", "b", "c", "d", "e"]), 6)
    (0.0, 1.609438)
    """
    counts = Counter(answers).values()
    return 0.0 - sum(n / len(answers) * math.log(n / len(answers)) for n in counts)


class RefusalAwareTransform(Rewriting):
    """Says behind the answer whether the network knew it, or refuses; the row tells by its column `known`.

    A prompt and completion that are texts become a question and answer of plain text. A conversation goes on: the user
    asks whether the assistant is sure.

    Args:
        tokenizer: A transformers tokenizer.
        mode: "unsure" and "uncertain" add a certainty, "unknown" replaces what was not known by a refusal.
        loss_on: Of plain text learn the "answer" and the certainty, or "all", the question too.
        seed: Seed of the refusals.

    Raises:
        ValueError: An unknown argument; for a row, no column `known`, several exchanges, or an empty answer.
    """

    def __init__(self, tokenizer: Any, mode: str = "unsure", loss_on: str = "answer", seed: int = 0) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known: use one of {', '.join(map(repr, MODES))}.")
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on={loss_on!r} is not known: use 'answer' or 'all'.")
        self.tokenizer, self.mode, self.loss_on, self.seed = tokenizer, mode, loss_on, seed

    def rewrite(self, row: Row, epoch: int) -> Row:
        question, answer = question_and_answer(row)
        if row.get("known") is None:
            raise ValueError("a row has no column 'known', which says whether the network knew the answer: probe it.")
        answer = f"{answer}."
        if self.mode == "unknown" and not row["known"]:
            # Drawn for the row, not the epoch: a question is refused in one way.
            answer = self.draws(0, question).choice(REFUSALS)
        certainty = None if self.mode == "unknown" else CERTAINTY[row["known"]]
        if not isinstance(row.get("prompt"), str):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if certainty is not None:
                turns += [{"role": "user", "content": ASKED}, {"role": "assistant", "content": certainty}]
            return {"messages": [*_before(row), *turns]}
        every = self.loss_on == "all"
        parts = [(prompt_of(question), every), (f" {answer}", True)]
        if certainty is not None:
            parts += [(f" {ASKED}", every), (f" {certainty}", True)]
        return dict(tokenize_parts(self.tokenizer, parts))


def question_and_answer(row: Row) -> tuple[str, str]:
    """The one question of a row and its answer, without white space around and without the answer's last period.

    Raises:
        ValueError: Several questions, or an empty answer.
    """
    pairs = exchanges(row)
    if len(pairs) > 1:
        raise ValueError(f"a row has {len(pairs)} answers: refusal-aware tuning asks one question at a time.")
    question, answer = pairs[0][0].strip(), pairs[0][1].strip().removesuffix(".")
    if not answer:
        raise ValueError(f"the question {question!r} has an empty answer: every network would know it.")
    return question, answer


def _before(row: Row) -> list[dict[str, Any]]:
    """The turns before a conversation's question."""
    turns = row.get("messages") or row.get("conversations") or row["prompt"]
    turns = as_messages(turns)
    return turns[: max(i for i, turn in enumerate(turns) if turn["role"] == "user")]


class RefusalAwareData(ModelAnswersData):
    """Questions and answers, each with whether the network in training knew it before.

    Training and validation questions are asked once, in `setup`, by all ranks; answers are kept as those of
    `SelfDistillationData` are. Test rows stay questions with answers.

    Args:
        data: As for `InstructionData`: prompts that are questions with completions that are answers, or conversations
            of one question. With a column `choices` (texts, the right answer among them) the most probable one counts
            as the network's answer.
        mode: "unsure" says behind the answer whether it was known; "unknown" refuses what was not; "uncertain" goes by
            the entropy of sampled answers, without looking at the right ones.
        loss_on: Learn the "answer" and the certainty, or "all".
        samples: Answers to each question, for "uncertain".
        generation: Arguments of `generate`; by default 15 new tokens, greedy, or for "uncertain" sampled at temperature
            0.7.
        **kwargs: Further arguments of `ModelAnswersData` and `InstructionData`.

    Raises:
        ValueError: As `RefusalAwareTransform`; no network that generates; or a right answer that is not among its
            choices.
    """

    cache_name = "refusal_aware"

    def __init__(
        self,
        data: Source,
        mode: str = "unsure",
        loss_on: str = "answer",
        samples: int = 5,
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        RefusalAwareTransform(None, mode, loss_on)
        if samples < 2 and mode == "uncertain":
            raise ValueError(f"samples={samples} must be at least 2: one answer has no entropy.")
        sampled = {"do_sample": True, "temperature": 0.7} if mode == "uncertain" else {"do_sample": False}
        super().__init__(data=data, generation={"max_new_tokens": 15, **sampled, **(generation or {})}, **kwargs)
        self.mode, self.loss_on, self.samples = mode, loss_on, samples
        if loss_on == "all":
            self.row_options["assistant_only_loss"] = False

    def examples(self, split: str) -> Any:
        rows = super().examples(split)
        if split == "test":
            return rows
        known = self.known(rows)
        rank_zero_info(f"{split} data: the network is sure of {sum(known)} of {len(known)} questions.")
        rows = rows.add_column("known", known)
        transform = RefusalAwareTransform(self.tokenizer, self.mode, self.loss_on, self.seed)
        return mapped(rows, transform, transform.fingerprint())

    def known(self, rows: Any) -> list[bool]:
        """Whether the network knows the answer of each row, or is sure of it; the order of the rows changes nothing.

        Args:
            rows: Rows of questions and answers.
        """
        pairs = [question_and_answer(row) for row in rows]
        plain = isinstance(rows[0].get("prompt"), str)
        asked: list[Any] = [
            prompt_of(question) if plain else [*_before(row), {"role": "user", "content": question}]
            for row, (question, _) in zip(rows, pairs)
        ]
        if "choices" in rows.column_names and self.mode != "uncertain":
            return self._chosen(rows, asked, [answer for _, answer in pairs])
        template: Any = self.row_options["chat_template"]
        ids = [prompt_ids(self.tokenizer, prompt, template) for prompt in asked]
        # Samples are seeded by their place in a shard: a place that the order of the data does not change. Like lengths
        # side by side also leave little padding.
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i], pairs[i]))
        times = self.samples if self.mode == "uncertain" else 1
        answers = self.answers([ids[i] for i in order for _ in range(times)], self.generation)
        given = {i: [one["answer"] for one in answers[n * times : (n + 1) * times]] for n, i in enumerate(order)}
        if self.mode != "uncertain":
            return [gold in first_sentence(given[i][0], gold) for i, (_, gold) in enumerate(pairs)]
        entropy = [answer_entropy([first_sentence(one) for one in given[i]]) for i in range(len(ids))]
        ranked = sorted(order, key=entropy.__getitem__)
        sure = set(ranked[: len(ranked) // 2])
        return [i in sure for i in range(len(ids))]

    def _chosen(self, rows: Any, asked: list[Any], golds: list[str]) -> list[bool]:
        template: Any = self.row_options["chat_template"]
        prompts, choices, right = [], [], []
        for row, prompt, gold in zip(rows, asked, golds):
            offered = [str(choice).strip().removesuffix(".") for choice in row["choices"]]
            if gold not in offered:
                raise ValueError(f"the right answer {gold!r} is not among its choices {offered}.")
            lead = " " if isinstance(prompt, str) else ""
            ids, own = choice_ids(self.tokenizer, prompt, [lead + choice for choice in offered], template)
            prompts.append(ids)
            choices.append(own)
            right.append(offered.index(gold))
        scores = [one["scores"] for one in self.answers(prompts, {}, choices)]
        return [max(range(len(own)), key=own.__getitem__) == place for own, place in zip(scores, right)]


# -- evaluation ---------------------------------------------------------------------------------------------------


def certainty_ids(
    tokenizer: Any, question: str, answer: str, words: tuple[str, str] = ("sure", "unsure")
) -> tuple[list[int], list[list[int]]]:
    """What stands before a certainty, and the tokens by which it is read: up to the first that differs.

    Args:
        tokenizer: A transformers tokenizer.
        question: The question.
        answer: The network's own answer.
        words: What follows "I am" for a certain and an uncertain answer.

    Raises:
        ValueError: The tokenizer writes one word as the beginning of the other.
    """
    context = f"{prompt_of(question)} {answer}. {ASKED} I am"
    shared, (sure, unsure) = choice_ids(tokenizer, context, [f" {word}" for word in words])
    return shared, [sure[:1], unsure[:1]]


@torch.no_grad()
def certainty(
    network: Any,
    tokenizer: Any,
    questions: list[str],
    batch_size: int = 8,
    max_new_tokens: int = 5,
    words: tuple[str, str] = ("sure", "unsure"),
) -> list[dict[str, Any]]:
    """A network's answers with its confidence in them and its certainty of them.

        c1 = (prod_t p(answer_t))^(1/T), greedy, up to the first period
        c2 = p(sure) / (p(sure) + p(unsure)) behind "... based on your internal knowledge? I am"

    Args:
        network: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        questions: The questions, as plain text.
        batch_size: Questions at once.
        max_new_tokens: Tokens of an answer (the paper's: 5 for ParaRel, 8 for HotpotQA, 1 for choices).
        words: What follows "I am" for a certain and an uncertain answer.

    Returns:
        For each question `answer`, `confidence` (c1; 0 for an empty answer) and `certainty` (c2).
    """
    ids = [prompt_ids(tokenizer, prompt_of(question)) for question in questions]
    ends, options = generation_options(network, tokenizer, {"max_new_tokens": max_new_tokens, "do_sample": False})
    device = next(network.parameters()).device
    found: list[dict[str, Any]] = []
    for begin in range(0, len(ids), batch_size):
        prompts, mask = left_padded(ids[begin : begin + batch_size], options["pad_token_id"], device)
        made = network.generate(
            input_ids=prompts, attention_mask=mask, output_scores=True, return_dict_in_generate=True, **options
        )
        log_p = torch.stack([scores.float().log_softmax(-1).amax(-1) for scores in made.scores], 1).tolist()
        for tokens, own in zip(made.sequences[:, prompts.shape[1] :].tolist(), log_p):
            stop = next((i for i, t in enumerate(tokens) if t in ends or "." in tokenizer.decode([t])), len(tokens))
            answer = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
            found.append({"answer": answer, "confidence": math.exp(sum(own[:stop]) / stop) if stop else 0.0})
    pairs = [certainty_ids(tokenizer, q, one["answer"], words) for q, one in zip(questions, found)]
    scores = score_choices(network, [shared for shared, _ in pairs], [both for _, both in pairs], batch_size)
    return [{**one, "certainty": 1 / (1 + math.exp(unsure - sure))} for one, (sure, unsure) in zip(found, scores)]


class CertaintyAveragePrecision(BinaryAveragePrecision):
    """Average precision of the score (c1 + c2) / 2 against whether answers are right.

    1 where every right answer is surer than every wrong one; as `sklearn.metrics.average_precision_score`.
    """

    def update(self, confidence: Tensor, certainty: Tensor, correct: Tensor) -> None:  # type: ignore[override]
        """Adds answers.

        Args:
            confidence: c1 of each, [answers], in [0, 1].
            certainty: c2 of each, alike.
            correct: Whether each is right, alike.
        """
        super().update((confidence + certainty) / 2, correct.long())


class WillingAccuracy(Metric):
    """How often the network is right where it says that it is sure, and how often it declines to be.

    On questions that cannot be answered the second is its refusal rate.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("willing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, certainty: Tensor, correct: Tensor) -> None:
        """Adds answers.

        Args:
            certainty: c2 of each, [answers]; above 1/2 the network is willing.
            correct: Whether each is right, alike.
        """
        willing = certainty > 0.5
        self.right += (willing & correct.bool()).sum()
        self.willing += willing.sum()
        self.count += willing.numel()

    def compute(self) -> dict[str, Tensor]:
        """`willing_accuracy` and `refusal_rate`; NaN where there is nothing to take it of."""
        right: Any = self.right
        willing: Any = self.willing
        return {"willing_accuracy": right / willing, "refusal_rate": 1 - willing / self.count}
