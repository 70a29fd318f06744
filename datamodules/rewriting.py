"""Techniques that rewrite the data: a function from row to row, and the DataModule that applies it where it belongs.

A rewriting is picklable and decided by the row, the seed and the epoch alone: neither the order of the data, nor the
number of workers and ranks, nor a resumed run changes a word. `rows.map(rewriting)` of the `datasets` library is all it
needs; `rows.map(rewriting, fn_kwargs={"epoch": 3})` gives another epoch's.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning_peft.datamodules.chat_template import IGNORED, as_messages
from lightning_peft.datamodules.collate import TokenRows
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex, ResumableSampler
from lightning_peft.datamodules.sources import Source
from lightning_peft.datamodules.tokenized import tokenize_row, tokenizer_fingerprint

#: Columns that say what is learnt: a rewriting gives new ones in their place. All others are carried along.
CONTENT = ("messages", "conversations", "prompt", "completion", "text", "input_ids", "labels")
#: The column that names the rewritings a row has been through.
REWRITTEN = "rewritten"
SAMPLING = ("per_epoch", "per_example")

Row = dict[str, Any]


class Rewriting:
    """A function from row to row. A technique overrides `rewrite`; it draws from `self.draws` and nowhere else."""

    seed: int = 0

    @abstractmethod
    def rewrite(self, row: Row, epoch: int) -> Row:
        """The new content of a row: `messages`, `prompt` and `completion`, `text`, or `input_ids` and `labels`."""

    def __call__(self, row: Row, epoch: int = 0) -> Row:
        """The rewritten row, other columns carried along.

        Args:
            row: A row of any of the formats of `InstructionData`.
            epoch: The epoch to draw for.

        Raises:
            ValueError: The row has been through this rewriting before.
        """
        row, name = dict(row), type(self).__name__
        before = list(row.get(REWRITTEN) or [])
        if name in before:
            raise ValueError(
                f"{name} is applied twice: the row has been through {', '.join(before)}. Give it the original rows."
            )
        carried = {key: value for key, value in row.items() if key not in CONTENT}
        return {**carried, **self.rewrite(row, epoch), REWRITTEN: [*before, name]}

    def draws(self, epoch: int, *content: str | bytes) -> random.Random:
        """A generator for a row: the same for the same seed, epoch and content in every process."""
        made = hashlib.sha256(f"{type(self).__name__}:{self.seed}:{epoch}".encode())
        for part in content:
            made.update(b"\0" + (part.encode() if isinstance(part, str) else part))
        return random.Random(int.from_bytes(made.digest()[:8], "big"))

    def settings(self) -> dict[str, Any]:
        """What it depends on besides its tokenizer, as JSON values."""
        return {key: value for key, value in vars(self).items() if key != "tokenizer" and not key.startswith("_")}

    def fingerprint(self) -> str:
        """A hash of all it depends on, the same in every process."""
        content = [type(self).__name__, json.dumps(self.settings(), sort_keys=True)]
        if getattr(self, "tokenizer", None) is not None:
            content.append(tokenizer_fingerprint(self.tokenizer))  # type: ignore[attr-defined]
        return hashlib.sha256("\0".join(content).encode()).hexdigest()[:32]


# -- questions and answers ----------------------------------------------------------------------------------------


def exchanges(row: Row) -> list[tuple[str, str]]:
    """The questions and answers of a row: prompt and completion, or each assistant's turn with the user's before it.

    Raises:
        ValueError: A row without an answer, an answer without a question, or content that is not text.

    >>> exchanges({"prompt": "2 + 2 =", "completion": " 4"})
    [('2 + 2 =', ' 4')]
    """
    if _is_text(row):
        return [(row["prompt"], row["completion"])]
    turns, first = _turns(row)
    pairs = [(turns[i - 1], turns[i]) for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
    if not pairs:
        raise ValueError("a row has no assistant's turn: there is no answer to rewrite.")
    for question, answer in pairs:
        if question["role"] != "user" or question is answer:
            raise ValueError(f"an assistant's turn follows a {question['role']}'s: it has to answer a user's.")
        for turn in (question, answer):
            if not isinstance(turn.get("content"), str):
                raise ValueError(f"a turn's content is a {type(turn.get('content')).__name__}: only text is rewritten.")
    return [(question["content"], answer["content"]) for question, answer in pairs]


def with_exchanges(row: Row, pairs: list[tuple[str, str]]) -> Row:
    """The content of a row with other questions and answers, in the format that it had.

    >>> with_exchanges({"prompt": "2 + 2 =", "completion": " 4"}, [("1 + 1 =", " 2")])
    {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    if _is_text(row):
        return {"prompt": pairs[0][0], "completion": pairs[0][1]}
    turns, first = _turns(row)
    turns = [dict(turn) for turn in turns]
    answers = [i for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
    for place, (question, answer) in zip(answers, pairs, strict=True):
        turns[place - 1]["content"], turns[place]["content"] = question, answer
    if "completion" in row:
        return {"prompt": turns[:first], "completion": turns[first:]}
    return {"messages": turns}


def _is_text(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)


def _turns(row: Row) -> tuple[list[dict[str, Any]], int]:
    """All turns of a row, and the first that may be an answer."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return as_messages([*row["prompt"], *row["completion"]]), len(row["prompt"])
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        raise ValueError(f"rows have the columns {sorted(row)}: give 'messages', or 'prompt' and 'completion'.")
    return as_messages(turns), 0


# -- rows of an epoch ---------------------------------------------------------------------------------------------


class EpochRows(TokenRows):
    """Rows that are rewritten anew in every epoch: index `i + e * len(rows)` is row `i` of epoch `e`.

    The epoch stands in the index, so that workers that live for many epochs know it too.

    Args:
        dataset: Original rows.
        rewriting: From a row and an epoch to the row that is learnt.
        tokenize: From that to `input_ids`, `labels` and further columns, as `tokenize_row` does.
    """

    def __init__(self, dataset: Any, rewriting: Callable[..., Row], tokenize: Callable[[Row], Row]) -> None:
        self.dataset, self.bins, self.token_columns = dataset, None, ()
        self.rewriting, self.tokenize = rewriting, tokenize

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(int(index), len(self))
        row = self.tokenize(self.rewriting(self.dataset[place], epoch))
        if not row.pop("learnable"):
            raise ValueError(f"row {place} has nothing to learn in epoch {epoch}.")
        del row["length"]
        if isinstance(index, RepeatedIndex):
            row["labels"] = [IGNORED] * len(row["labels"])
        return row


class EpochSampler(ResumableSampler):
    """A `ResumableSampler` whose indices say the epoch, for `EpochRows`. The arguments are the same."""

    def __iter__(self) -> Iterator[int]:
        for index in super().__iter__():
            yield type(index)(index + self.epoch * len(self.dataset))


class RewrittenData(InstructionData):
    """Instruction data that a `Rewriting` changes: what its techniques have in common.

    Training rows are rewritten; validation and test rows stay what the network will be asked. A technique gives
    `rewriting`, and perhaps `originals`.

    Args:
        data: As for `InstructionData`.
        sampling: Draw "per_epoch", anew in every epoch, or "per_example", once for each row.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: Rows that change from epoch to epoch cannot be packed, or come as a stream.
    """

    def __init__(
        self,
        data: Source,
        sampling: str = "per_example",
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, **kwargs)
        if sampling not in SAMPLING:
            raise ValueError(f"sampling={sampling!r} is not known: use 'per_epoch' or 'per_example'.")
        if sampling == "per_epoch" and (self.packing or self.streaming):
            raise ValueError(
                "packing=True and streaming=True need rows that stay what they are: set sampling='per_example'."
            )
        self.sampling = sampling

    @abstractmethod
    def rewriting(self, split: str) -> Rewriting | None:
        """What the rows of a split go through; `None` leaves them as they are."""

    def originals(self, split: str) -> Any:
        """The rows of a split before the rewriting."""
        return super().examples(split)

    def examples(self, split: str) -> Any:
        rows, rewriting = self.originals(split), self.rewriting(split)
        if rewriting is None:
            return rows
        return mapped(rows, rewriting, rewriting.fingerprint())

    def rows(self, split: str) -> Any | None:
        if self.sampling == "per_epoch" and split == "train" and split not in self._rows:
            if self._raw is None:
                self._raw = self.read()
            rewriting = self.rewriting(split)
            if rewriting is not None:
                tokenize = partial(tokenize_row, tokenizer=self.tokenizer, **self.row_options)
                self._rows[split] = EpochRows(self.originals(split), rewriting, tokenize)
        return super().rows(split)

    def _sampler(self, rows: TokenRows, shuffle: bool) -> ResumableSampler:
        made = super()._sampler(rows, shuffle)
        if isinstance(rows, EpochRows):
            ranks = {"num_replicas": made._num_replicas, "rank": made._rank}
            return EpochSampler(rows, shuffle=shuffle, seed=self.seed, **ranks)  # type: ignore[arg-type]
        return made


def mapped(rows: Any, function: Callable[..., Any], fingerprint: str, **options: Any) -> Any:
    """The rows through a function that gives whole rows, from `datasets`' cache where they went through it before.

    Args:
        rows: A `datasets.Dataset` or `IterableDataset`.
        function: From a row to a row.
        fingerprint: A hash of the function: `datasets`' own changes with what a tokenizer was used for before.
        **options: Further arguments of `rows.map`.
    """
    if hasattr(rows, "__len__"):
        key = f"{rows._fingerprint}:{fingerprint}"
        options["new_fingerprint"] = hashlib.sha256(key.encode()).hexdigest()[:32]
    return rows.map(function, remove_columns=rows.column_names, **options)


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of every text.

    Args:
        tokenizer: A transformers tokenizer.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    begin = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:begin]
