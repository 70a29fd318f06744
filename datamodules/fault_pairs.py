"""Pairs of a correct and a similar wrong program, with the tokens in which they differ (FAIT, arXiv 2503.16913).

Lines that only one of the two has are found by `difflib`; inside of changed lines characters are aligned by Levenshtein
distance; a token is marked if it holds a changed character. Where one side has nothing at the place of a change (a line
left out, a character put in) the token is marked at which the two part: it was chosen instead.
"""

from __future__ import annotations

import difflib
import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.chat_template import IGNORED, as_messages
from lightning_peft.datamodules.code_mutation import mutated
from lightning_peft.datamodules.collate import TokenRows, collate
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.standard_library_code import StandardLibraryCode
from lightning_peft.datamodules.tokenized import tokenize_row

GRANULARITIES = ("token", "line")
WRONG = "wrong_"
_WRONG_COLUMNS = ("wrong_input_ids", "wrong_fault_mask")
_LARGEST = 4_000_000  # cells of the Levenshtein table; beyond, a block counts as changed whole


class Change(NamedTuple):
    """Characters [begin, end) of the correct text that stand where [wrong_begin, wrong_end) of the wrong one do."""

    begin: int
    end: int
    wrong_begin: int
    wrong_end: int


class Encoded(NamedTuple):
    """A text's tokens and the characters [begin, end) that each holds."""

    ids: list[int]
    spans: list[tuple[int, int]]


def aligned(a: str, b: str) -> list[tuple[int, int, int, int]]:
    """Where two texts differ by a shortest edit: [begin, end) in `a`, [begin, end) in `b`, in order.

    >>> aligned("a < b", "a <= b")
    [(3, 3, 3, 4)]
    """
    front = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    most = min(len(a), len(b)) - front
    back = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), most)
    back = min(back, most)
    x, y = a[front : len(a) - back], b[front : len(b) - back]
    if not x or not y or len(x) * len(y) > _LARGEST:
        return [(front, front + len(x), front, front + len(y))] if x or y else []
    return [(front + i, front + j, front + k, front + m) for i, j, k, m in _levenshtein(x, y)]


def _levenshtein(a: str, b: str) -> list[tuple[int, int, int, int]]:
    codes = np.frombuffer(b.encode("utf-32-le"), dtype=np.uint32)
    steps = np.arange(len(b) + 1)
    rows = [steps]  # rows[i][j]: distance of a[:i] and b[:j]
    for i, char in enumerate(a, 1):
        last = rows[-1]
        best = np.empty_like(last)
        best[0] = i
        best[1:] = np.minimum(last[1:] + 1, last[:-1] + (codes != ord(char)))
        rows.append(np.minimum.accumulate(best - steps) + steps)  # and insertions, along the row
    i, j, changes = len(a), len(b), []
    while i or j:
        here = rows[i][j]
        if i and j and here == rows[i - 1][j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            if a[i] != b[j]:
                changes.append((i, i + 1, j, j + 1))
        elif i and here == rows[i - 1][j] + 1:
            i -= 1
            changes.append((i, i + 1, j, j))
        else:
            j -= 1
            changes.append((i, i, j, j + 1))
    merged: list[tuple[int, int, int, int]] = []
    for change in reversed(changes):
        if merged and merged[-1][1] == change[0] and merged[-1][3] == change[2]:
            change = (merged[-1][0], change[1], merged.pop()[2], change[3])
        merged.append(change)
    return merged


def changes(correct: str, wrong: str, granularity: str = "token") -> list[Change]:
    """Where a correct and a wrong text differ: by whole lines, or by characters inside of changed lines."""
    lines, wrong_lines = correct.splitlines(keepends=True), wrong.splitlines(keepends=True)
    at = [0, *itertools.accumulate(map(len, lines))]
    wrong_at = [0, *itertools.accumulate(map(len, wrong_lines))]
    found = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, lines, wrong_lines, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        whole = Change(at[i], at[j], wrong_at[k], wrong_at[m])
        if kind == "replace" and granularity == "token":
            inner = aligned(correct[whole.begin : whole.end], wrong[whole.wrong_begin : whole.wrong_end])
            begin, wrong_begin = whole.begin, whole.wrong_begin
            found += [Change(begin + a, begin + b, wrong_begin + c, wrong_begin + d) for a, b, c, d in inner]
        else:
            found.append(whole)
    return found


def fault_masks(correct: Encoded, wrong: Encoded, found: list[Change]) -> tuple[list[int], list[int]]:
    """1 for each token of the correct and of the wrong text that holds a changed character, 0 for the others."""
    masks = [0] * len(correct.ids), [0] * len(wrong.ids)
    for change in found:
        own, other = _overlapping(correct, change.begin, change.end), _overlapping(wrong, *change[2:])
        if not own and other:
            own = _parting(correct, change.begin, wrong, change.wrong_begin, other[0])
        elif not other and own:
            other = _parting(wrong, change.wrong_begin, correct, change.begin, own[0])
        for mask, places in zip(masks, (own, other)):
            for place in places:
                mask[place] = 1
    return masks


def _overlapping(text: Encoded, begin: int, end: int) -> list[int]:
    return [i for i, (a, b) in enumerate(text.spans) if a < end and begin < b and begin < end]


def _parting(text: Encoded, place: int, other: Encoded, other_place: int, token: int) -> list[int]:
    """The token of `text` at which it parts from `other`, whose first changed token is `token`."""
    # The other's token may begin before the change; what stands there is the same in both.
    start = place - max(other_place - other.spans[token][0], 0)
    own = next((i for i, (a, b) in enumerate(text.spans) if b > start and b > a), None)
    while own is not None and own < len(text.ids) and token < len(other.ids) and text.ids[own] == other.ids[token]:
        own, token = own + 1, token + 1
    return [own] if own is not None and own < len(text.ids) else []


# -- rows -------------------------------------------------------------------------------------------------------------


def with_completion(row: dict[str, Any], completion: str) -> dict[str, Any]:
    """The row with another answer: its completion, or the content of its last assistant's turn."""
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            turns = as_messages(row[column])
            last = _last_answer(turns)
            return {**row, column: [*turns[:last], {**turns[last], "content": completion}, *turns[last + 1 :]]}
    if isinstance(row.get("completion"), list):
        return {**row, "completion": [*row["completion"][:-1], {**row["completion"][-1], "content": completion}]}
    return {**row, "completion": completion}


def completion_of(row: dict[str, Any]) -> str:
    """The text that `with_completion` replaces.

    Raises:
        ValueError: The row has none.
    """
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            turns = as_messages(row[column])
            return turns[_last_answer(turns)]["content"]
    completion = row.get("completion")
    if completion is None:
        raise ValueError(f"a row has the columns {sorted(row)}: a pair needs 'completion' or 'messages'.")
    return completion[-1]["content"] if isinstance(completion, list) else completion


def _last_answer(turns: list[dict[str, Any]]) -> int:
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("a conversation has no assistant's turn, so there is nothing to set a wrong one against.")
    return answers[-1]


def encoded(
    tokenizer: Any, row: dict[str, Any], ids: list[int], chat_template: str | None = None
) -> tuple[str, Encoded]:
    """The text of a tokenised row and the characters that its tokens hold.

    Raises:
        ValueError: The tokenizer cannot tell characters, or cuts the text otherwise than it did.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token holds: use its fast version for pairs."
        )
    turns = row.get("messages", row.get("conversations"))
    if turns is None and isinstance(row.get("prompt"), list):
        turns = [*row["prompt"], *row["completion"]]
    if turns is None:
        text, special = row["prompt"] + row["completion"], True
    else:
        options = {k: v for k, v in (row.get("chat_template_kwargs") or {}).items() if v is not None}
        text = tokenizer.apply_chat_template(
            as_messages(turns), tokenize=False, chat_template=chat_template, tools=row.get("tools") or None, **options
        )
        special = False
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    if list(made["input_ids"]) != ids[: len(made["input_ids"])]:
        raise ValueError(
            "the tokenizer cuts a row's text otherwise than it did for training: its pair cannot be aligned."
        )
    spans = [tuple(span) for span in made["offset_mapping"]]
    # What was put behind the text (its end) stands behind its last character.
    return text, Encoded(ids, spans + [(len(text), len(text) + 1)] * (len(ids) - len(spans)))


def tokenize_pair(
    row: dict[str, Any], wrong: str, tokenizer: Any, granularity: str = "token", **options: Any
) -> dict[str, Any]:
    """The tokens of a row, those of the row with a wrong answer, and which differ.

    Args:
        row: As for `tokenize_row`.
        wrong: The wrong answer.
        tokenizer: A fast tokenizer of transformers.
        granularity: "token" or "line".
        **options: As for `tokenize_row`.

    Returns:
        `input_ids`, `labels`, `fault_mask` and `wrong_input_ids`, `wrong_fault_mask`; masks hold learnt tokens only.
    """
    sides = []
    for own in (row, with_completion(row, wrong)):
        tokens = tokenize_row(own, tokenizer, **options)
        text, spans = encoded(tokenizer, own, list(tokens["input_ids"]), options.get("chat_template"))
        sides.append((tokens, text, spans))
    (tokens, text, correct), (wrong_tokens, wrong_text, other) = sides
    masks = fault_masks(correct, other, changes(text, wrong_text, granularity))
    mask, wrong_mask = (
        [int(marked and label != IGNORED) for marked, label in zip(own, made["labels"])]
        for own, made in zip(masks, (tokens, wrong_tokens))
    )
    pair: dict[str, Any] = {key: tokens[key] for key in ("input_ids", "labels", "weight") if key in tokens}
    return pair | {"fault_mask": mask, "wrong_input_ids": wrong_tokens["input_ids"], "wrong_fault_mask": wrong_mask}


class FaultPairRows(TokenRows):
    """Tokenised pairs: a correct row (packed or not), and its wrong one under names that begin with "wrong_".

    Args:
        dataset: Pairs as `tokenize_pair` gives them.
        bins: Which pairs share a row; by default each has its own.
        token_columns: Further columns with a value for each token of the correct row.
    """

    def __init__(self, dataset: Any, bins: list[list[int]] | None = None, token_columns: Any = ()) -> None:
        names = [name for name in dataset.column_names if name.startswith(WRONG)]
        super().__init__(dataset.remove_columns(names), bins, token_columns)
        bare = dataset.select_columns(names).rename_columns({name: name.removeprefix(WRONG) for name in names})
        self.wrong = TokenRows(bare, bins, ("fault_mask",))

    def __getitem__(self, index: int) -> dict[str, Any]:
        wrong = self.wrong[int(index)]
        return {**super().__getitem__(index), **{WRONG + name: value for name, value in wrong.items()}}


def collate_pairs(rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """`collate` for rows that bring a second sequence under names that begin with "wrong_", padded by itself."""
    first = [{name: value for name, value in row.items() if not name.startswith(WRONG)} for row in rows]
    second = [
        {name.removeprefix(WRONG): value for name, value in row.items() if name.startswith(WRONG)} for row in rows
    ]
    wrong = collate(second, **options)
    return {**collate(first, **options), **{WRONG + name: value for name, value in wrong.items()}}


class FaultPairs(InstructionData):
    """Rows with a wrong answer beside the correct one, for `FaultAwareMixin`.

    Rows as for `InstructionData`, with the wrong answer (a text, or a list of them: a pair each) in `wrong_column`;
    rows without one get mutations of their answer, taken to be Python. Pairs that do not differ, or whose difference is
    cut off at `max_length`, are left out and counted. Adds `fault_mask` [batch, time], `wrong_input_ids`,
    `wrong_fault_mask` and `wrong_attention_mask` [batch, wrong time]; packed rows bring `wrong_document_ids` and
    `wrong_position_ids` instead of the last.

    Args:
        *args: As for `InstructionData`.
        wrong_column: Column of the wrong answers.
        mutations: Pairs made by mutation from a row without a wrong answer, at most.
        granularity: "token" marks changed characters' tokens; "line" all tokens of changed lines.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: An argument is out of range, the tokenizer is a slow one, or no pair is left.
    """

    def __init__(
        self,
        *args: Any,
        wrong_column: str = "wrong",
        mutations: int = 1,
        granularity: str = "token",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r} is not known: use one of {GRANULARITIES}.")
        if mutations < 0:
            raise ValueError(f"mutations={mutations} must be at least 0.")
        if self.streaming:
            raise ValueError("streaming=True: pairs are made for a data set at hand; give a part of the stream.")
        self.wrong_column, self.mutations, self.granularity = wrong_column, mutations, granularity
        #: Columns of the raw rows that pairs carry along.
        self.carried = (*self.row_options["keep_columns"], *self.token_columns)
        self.token_columns += ("fault_mask",)
        # Pairs come tokenised; what cuts, checks and counts all rows then does so with them.
        self.row_options["keep_columns"] = (*self.row_options["keep_columns"], *_WRONG_COLUMNS)
        self.row_options["token_columns"] = self.token_columns

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        options = {**self.row_options, "max_length": None, "keep_columns": (), "token_columns": ()}
        pairs, same, alone = [], 0, 0
        for row in rows:
            wrongs = self._wrongs(row)
            alone += not wrongs
            for wrong in wrongs:
                pair = tokenize_pair(row, wrong, self.tokenizer, self.granularity, **options)
                pair |= {name: row[name] for name in self.carried}
                if any(pair["fault_mask"][: self.max_length]) and any(pair["wrong_fault_mask"][: self.max_length]):
                    pairs.append(pair)
                else:
                    same += 1
        rank_zero_info(
            f"{split} data: {len(pairs)} pairs from {len(rows)} rows; left out are {same} that do not differ within "
            f"max_length={self.max_length}, and {alone} rows without a wrong answer."
        )
        if not pairs:
            raise ValueError(
                f"{split} data: none of {len(rows)} rows gives a pair: {alone} have no {self.wrong_column!r} and "
                f"cannot be mutated as Python, {same} do not differ within max_length={self.max_length}."
            )
        return datasets.Dataset.from_list(pairs)

    def _wrongs(self, row: dict[str, Any]) -> list[str]:
        given = row.get(self.wrong_column)
        if given:
            return [given] if isinstance(given, str) else list(given)
        context = row["prompt"] if isinstance(row.get("prompt"), str) else ""
        return mutated(completion_of(row), context, self.mutations, self.seed)

    def documents(self, split: str) -> Any:
        return super().documents(split).map(partial(_cut, columns=_WRONG_COLUMNS, max_length=self.max_length))

    def lengths(self, documents: Any) -> list[int]:
        pairs = documents.with_format("numpy")
        return [max(len(a), len(b)) for a, b in zip(pairs["input_ids"], pairs["wrong_input_ids"])]

    def token_rows(self, documents: Any, bins: list[list[int]] | None) -> TokenRows:
        return FaultPairRows(documents, bins, self.token_columns)

    def collate_fn(self) -> Any:
        return partial(collate_pairs, **super().collate_fn().keywords)  # type: ignore[attr-defined]


def _cut(row: dict[str, Any], columns: tuple[str, ...], max_length: int) -> dict[str, Any]:
    return {name: row[name][:max_length] for name in columns}


class StandardLibraryFaultPairs(FaultPairs, StandardLibraryCode):
    """Functions of Python's standard library, each beside a variant with one mistake.

    Args:
        **kwargs: Arguments of `FaultPairs` (without `data`) and `StandardLibraryCode`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
