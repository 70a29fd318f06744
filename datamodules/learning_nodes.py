"""Learning nodes (AnalogSeeker, paper 52, arXiv 2508.10409): texts become questions with worked answers.

Each text of a corpus is taken apart into learning nodes, pieces of knowledge that can be learnt one at a time; a node
becomes questions, and a question a line of reasoning with an answer, written with node and text at hand:

    text -> nodes;    (text, node) -> questions;    (text, node, question) -> (reasoning, answer)

What is learnt is the question's reasoning and answer without the text. In the paper agents of large networks do it, and
2,698 nodes gave 15.3 thousand rows, 5.7 a node. Neither their prompts nor their code are published: the requests, their
replies' form and the checks are ours.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.answers import prompt_ids
from lightning_peft.datamodules.model_answers import ModelAnswersData
from lightning_peft.datamodules.sources import Source
from lightning_peft.models.optimizers import imported

NODES = (
    "Read the text below. List the pieces of knowledge that a learner should take from it, {count} at most. Each "
    "stands on a line of its own that begins with '- ', can be learnt alone and says all that it needs: what it is "
    "about, what holds, and when. Reply with the list alone.\n\nText:\n{text}"
)
QUESTIONS = (
    "Write {count} different questions that only somebody can answer who has understood the piece of knowledge below. "
    "It comes from the text under it. Each question stands on a line of its own that begins with '- ', can be "
    "understood without the text and does not mention it. Reply with the list alone.\n\n"
    "Knowledge:\n{node}\n\nText:\n{text}"
)
SOLUTION = (
    "Answer the question below with the help of the piece of knowledge and the text under it, but mention neither. "
    "First reason step by step, beginning with 'Reasoning:'. Then give the answer on a new line that begins with "
    "'Answer:'.\n\nQuestion:\n{question}\n\nKnowledge:\n{node}\n\nText:\n{text}"
)

_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+(.*)")
_ANSWER = re.compile(r"^[ \t*#]*answer[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
_REASONING = re.compile(r"^[\s*#]*reasoning[ \t*]*:[\s*]*", re.IGNORECASE)

#: From requests to a reply to each.
Generator = Callable[[list[str]], list[str]]


def list_items(text: str) -> list[str]:
    """The items of a list, bulleted or numbered; lines that begin no item go on with the one before.

    Args:
        text: A reply.

    >>> list_items("Here they are:\\n1. One,\\n   and more.\\n2) Two.")
    ['One, and more.', 'Two.']
    """
    items: list[str] = []
    for line in text.splitlines():
        begun = _ITEM.fullmatch(line)
        if begun:
            items.append(begun[1])
        elif items and line.strip():
            items[-1] += f" {line.strip()}"
    return [item.strip() for item in items if item.strip()]


def reasoning_and_answer(text: str) -> tuple[str, str]:
    """What stands before the last line that begins with "Answer:", and what follows there; empty where one is missing.

    Args:
        text: A reply.

    >>> reasoning_and_answer("Reasoning: 2 and 2 are 4.\\nAnswer: 4")
    ('2 and 2 are 4.', '4')
    """
    marks = list(_ANSWER.finditer(text))
    if not marks:
        return "", ""
    return _REASONING.sub("", text[: marks[-1].start()]).strip(), text[marks[-1].end() :].strip()


def behind_thought(text: str, think_marks: tuple[str, str]) -> str:
    """What a network that thinks first says then: nothing where its thought does not end.

    Args:
        text: A reply.
        think_marks: What stands before and behind a thought.

    >>> behind_thought("<think>- no</think>- yes", ("<think>", "</think>")), behind_thought("- yes", ("(", ")"))
    ('- yes', '- yes')
    """
    _, ended, said = text.rpartition(think_marks[1])
    return said if ended or think_marks[0] not in said else ""


class LearningNodeDistillation(ModelAnswersData):
    """Texts as questions with reasoning and answers, made of their learning nodes.

    Made once, in `setup`, by all ranks; each of the three passes is kept as answers of `SelfDistillationData` are, so a
    killed run goes on where it stood. Replies that are not as asked for are left out, counted and told. Validation and
    test rows without `text` (questions to evaluate by) stay as they are. A text's questions all lie in its split.

    Args:
        data: As for `InstructionData`: rows with `text`, a section each; it has to fit into a request as a whole.
        generator: What replies: a function from requests (texts) to replies, or the path of one. The cache knows it by
            its path, and by its attribute `fingerprint` where it has one: give it one that changes with its settings.
            By default the network does, or that of `model`.
        nodes_per_text: Nodes of a text at most.
        questions_per_node: Questions of a node at most.
        nodes_request: Request for nodes, with `{text}` and perhaps `{count}`.
        questions_request: Request for questions, with `{node}` and perhaps `{text}` and `{count}`.
        solution_request: Request for reasoning and answer, with `{question}` and perhaps `{node}` and `{text}`.
        think_marks: What stands before and behind the reasoning in what is learnt.
        generation: Arguments of `generate` where a network replies; by default greedy, at most 1,024 new tokens.
        **kwargs: Further arguments of `ModelAnswersData` and `InstructionData`.

    Raises:
        ValueError: A request lacks its place or has an unknown one; a generator that cannot be told from others, or
            whose replies are not one text for each request; training rows without `text`; or nothing is left.
    """

    cache_name = "learning_nodes"

    def __init__(
        self,
        data: Source,
        generator: str | Any | None = None,
        nodes_per_text: int = 8,
        questions_per_node: int = 6,
        nodes_request: str = NODES,
        questions_request: str = QUESTIONS,
        solution_request: str = SOLUTION,
        think_marks: tuple[str, str] = ("<think>", "</think>"),
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data=data, generation={"max_new_tokens": 1024, "do_sample": False, **(generation or {})}, **kwargs
        )
        for what in ("nodes_per_text", "questions_per_node"):
            if locals()[what] < 1:
                raise ValueError(f"{what}={locals()[what]} must be at least 1.")
        _check_places("nodes_request", nodes_request, "text", {"count"})
        _check_places("questions_request", questions_request, "node", {"text", "count"})
        _check_places("solution_request", solution_request, "question", {"node", "text"})
        if generator is not None and self.model is not None:
            raise ValueError(f"generator and model={self.model!r} are both to reply: give one of them.")
        self.generator: Generator | None = imported(generator, "generator") if isinstance(generator, str) else generator
        self._generator_name = None if self.generator is None else _name_of(self.generator)
        self.nodes_per_text, self.questions_per_node = nodes_per_text, questions_per_node
        self.nodes_request, self.questions_request = nodes_request, questions_request
        self.solution_request, self.think_marks = solution_request, (think_marks[0], think_marks[1])

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        if "text" not in rows.column_names:
            if split != "train":
                return rows
            raise ValueError(f"training rows have the columns {rows.column_names}: give 'text' to make questions of.")
        texts = list(rows["text"])
        made, lost = self.distilled(texts)
        told = ", ".join(f"{n} {what}" for what, n in lost.items() if n) or "nothing"
        nodes = len({(row["source"], row["node"]) for row in made})
        rank_zero_info(f"{split} data: {len(made)} questions on {nodes} nodes of {len(texts)} texts; left out: {told}.")
        if not made:
            raise ValueError(
                f"none of {len(texts)} {split} texts gives a question with reasoning and answer (left out: {told}): "
                "give a better generator or model, longer replies with generation=, or requests that it understands."
            )
        kept: Any = self.row_options["keep_columns"]
        carried = [name for name in ["weight", *kept] if name in rows.column_names]
        return datasets.Dataset.from_list(
            [{**{name: rows[row["source"]][name] for name in carried}, **self._row(**row)} for row in made]
        )

    def distilled(self, texts: list[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The three passes.

        Args:
            texts: The corpus.

        Returns:
            Rows with `source` (the text's number), `node`, `question`, `reasoning` and `answer`, and how many texts,
            nodes and questions were left out, by reason.
        """
        lost = dict.fromkeys(
            ["requests too long", "texts without nodes", "nodes without questions", "questions asked twice",
             "questions without reasoning or answer"], 0
        )  # fmt: skip
        nodes: list[dict[str, Any]] = []
        questions: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        requests = [self.nodes_request.format(text=text, count=self.nodes_per_text) for text in texts]
        for source, reply in enumerate(self._replies(requests, lost)):
            found = _listed(reply, self.nodes_per_text)
            nodes += [{"source": source, "node": node} for node in found]
            lost["texts without nodes"] += reply is not None and not found

        requests = [
            self.questions_request.format(node=one["node"], text=texts[one["source"]], count=self.questions_per_node)
            for one in nodes
        ]
        asked: set[str] = set()
        for one, reply in zip(nodes, self._replies(requests, lost)):
            found = _listed(reply, self.questions_per_node)
            new = [question for question in found if question.casefold() not in asked]
            asked.update(question.casefold() for question in new)
            questions += [{**one, "question": question} for question in new]
            lost["questions asked twice"] += len(found) - len(new)
            lost["nodes without questions"] += reply is not None and not found

        requests = [
            self.solution_request.format(question=one["question"], node=one["node"], text=texts[one["source"]])
            for one in questions
        ]
        for one, reply in zip(questions, self._replies(requests, lost)):
            if reply is None:
                continue
            reasoning, answer = reasoning_and_answer(reply["answer"]) if reply["finished"] else ("", "")
            if reasoning and answer:
                rows.append({**one, "reasoning": reasoning, "answer": answer})
            else:
                lost["questions without reasoning or answer"] += 1
        return rows, lost

    def _row(self, source: int, node: str, question: str, reasoning: str, answer: str) -> dict[str, Any]:
        response = f"{self.think_marks[0]}\n{reasoning}\n{self.think_marks[1]}\n{answer}"
        if not self._conversational:
            return {"prompt": f"{question}\n", "completion": response, "node": node, "source": source}
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return {"messages": turns, "node": node, "source": source}

    @property
    def _conversational(self) -> bool:
        return bool(self.row_options["chat_template"] or getattr(self.tokenizer, "chat_template", None))

    # -- replies --------------------------------------------------------------------------------------------------

    def _replies(self, requests: list[str], lost: dict[str, int]) -> list[dict[str, Any] | None]:
        """For each request `answer` and whether it is `finished`; `None`, counted, where it leaves no room for one."""
        if not requests:
            return []
        if self.generator is not None:
            return self._generated(self.generator, requests)
        template: Any = self.row_options["chat_template"]
        turns = [[{"role": "user", "content": one}] if self._conversational else f"{one}\n\n" for one in requests]
        ids = [prompt_ids(self.tokenizer, one, template) for one in turns]  # type: ignore[arg-type]
        room = getattr(self.network().config, "max_position_embeddings", None) or float("inf")
        fitting = [i for i, own in enumerate(ids) if len(own) + self.generation.get("max_new_tokens", 0) <= room]
        lost["requests too long"] += len(ids) - len(fitting)
        given = dict(zip(fitting, self.answers([ids[i] for i in fitting], self.generation)))
        for one in given.values():
            one["answer"] = behind_thought(one["answer"], self.think_marks)
        return [given.get(i) for i in range(len(ids))]

    def _generated(self, generator: Generator, requests: list[str]) -> Any:
        """The replies of a function, in the same shards as a network's."""

        def reply(shard: list[Any], number: int) -> list[dict[str, Any]]:
            made = list(generator(list(shard)))
            if len(made) != len(shard) or not all(isinstance(one, str) for one in made):
                raise ValueError(
                    f"generator={self._generator_name} gave {len(made)} replies to {len(shard)} requests: it has to "
                    "give a list with one text for each."
                )
            return [{"answer": one, "finished": True} for one in made]

        return self.in_shards(requests, reply, {"generator": self._generator_name})


def _listed(reply: dict[str, Any] | None, most: int) -> list[str]:
    """The different items of a reply, in order; the last one of a reply that was cut off is not whole."""
    if reply is None:
        return []
    items = list_items(reply["answer"])
    different: dict[str, str] = {}
    for item in items if reply["finished"] else items[:-1]:
        different.setdefault(item.casefold(), item)
    return list(different.values())[:most]


def _check_places(what: str, request: str, needed: str, further: set[str]) -> None:
    places = {name for _, name, _, _ in string.Formatter().parse(request) if name is not None}
    if needed not in places or places - further - {needed}:
        raise ValueError(
            f"{what} has the places {sorted(places)}: it needs {{{needed}}}, and {sorted(further)} are all that it may "
            "have besides (write a brace of its own twice)."
        )


def _name_of(generator: Any) -> str:
    """What the cache knows a generator by."""
    if not callable(generator):
        raise ValueError(f"generator={generator!r} cannot be called: give a function from requests to replies.")
    fingerprint = getattr(generator, "fingerprint", None)
    own = generator if hasattr(generator, "__qualname__") else type(generator)
    name = f"{own.__module__}.{own.__qualname__}"
    if fingerprint is None and (own is not generator or "<" in name):
        raise ValueError(
            f"generator={name} cannot be told from others in the cache: give a function of a module, or set its "
            "attribute `fingerprint` to a text that changes with whatever its replies depend on."
        )
    return name if fingerprint is None else f"{name}:{fingerprint}"
