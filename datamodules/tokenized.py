"""Rows of any of TRL's dataset formats as tokens, with the checks that have to come before the first step."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.chat_template import (
    IGNORED,
    Tokens,
    as_messages,
    tokenize_messages,
    tokenize_prompt_completion,
    tokenize_text,
)

OVERLONG = ("truncate", "drop", "raise")
_VERSION = 1  # part of the cache's key: raise it when tokens change for the same rows


def tokenize_row(
    row: dict[str, Any],
    tokenizer: Any,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
    chat_template: str | None = None,
    keep_columns: tuple[str, ...] = (),
    token_columns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Tokens and labels of one row, cut at `max_length`.

    Args:
        row: `messages` (or `conversations`); `prompt` and `completion`, each a text or messages; `text`; or `input_ids`
            with `labels`, tokenised already. Further columns: `weight`, `tools`, `chat_template_kwargs` as in TRL.
        tokenizer: A transformers tokenizer.
        max_length: Tokens kept, from the front; all by default.
        assistant_only_loss: In conversations learn the assistant's turns only.
        completion_only_loss: Learn the completion only, rather than prompt and completion.
        chat_template: In place of the tokenizer's own.
        keep_columns: Columns carried along.
        token_columns: Columns with a value for each of the row's tokens, cut like these.

    Returns:
        `input_ids`, `labels`, `weight`, `keep_columns` and `token_columns` where the row has them; `length`, the tokens
        before the cut; and `learnable`, the labels that are left to predict.
    """
    tokens = _tokens(row, tokenizer, assistant_only_loss, completion_only_loss, chat_template)
    length = len(tokens["input_ids"])
    out: dict[str, Any] = {key: value[:max_length] for key, value in tokens.items()}
    # Nothing predicts the first token.
    out |= {"length": length, "learnable": sum(label != IGNORED for label in out["labels"][1:])}
    if "weight" in row:
        weight = row["weight"]
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"a row has weight={weight!r}: every row needs a finite number.")
        out["weight"] = float(weight)
    for column in token_columns:
        values = row[column]
        if values is None or not len(out["input_ids"]) <= len(values) <= length:
            raise ValueError(
                f"{column} has {0 if values is None else len(values)} values for a row of {length} tokens"
                + (f" (max_length={max_length})" if max_length else "")
                + ": it needs one for each token that is kept. Was it made with another tokenizer, chat template or "
                "max_length?"
            )
        out[column] = values[:max_length]
    return out | {column: row[column] for column in keep_columns}


def _tokens(
    row: dict[str, Any], tokenizer: Any, assistant_only: bool, completion_only: bool, chat_template: str | None
) -> Tokens:
    options = {
        "chat_template": chat_template,
        "tools": row.get("tools") or None,
        **{key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None},
    }
    if "input_ids" in row and "labels" in row:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise ValueError(f"a row has {len(ids)} input_ids and {len(labels)} labels: every token needs its own.")
        return {"input_ids": ids, "labels": labels}
    turns = row.get("messages", row.get("conversations"))
    if turns is not None:
        return tokenize_messages(tokenizer, as_messages(turns), assistant_only, **options)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return tokenize_prompt_completion(tokenizer, prompt, completion, completion_only)
        if isinstance(prompt, list) and isinstance(completion, list):
            first = len(prompt) if completion_only else 0
            messages = as_messages([*prompt, *completion])
            return tokenize_messages(tokenizer, messages, assistant_only, first, **options)
        raise ValueError("prompt and completion must both be texts or both be lists of messages.")
    if isinstance(row.get("text"), str):
        return tokenize_text(tokenizer, row["text"])
    raise ValueError(
        f"rows have the columns {sorted(row)}: give 'messages', 'prompt' and 'completion', 'text', or 'input_ids' and "
        "'labels' (rename columns with transforms= or in the data set)."
    )


def tokenized(rows: Any, tokenizer: Any, overlong: str, what: str, num_proc: int | None, **options: Any) -> Any:
    """All rows as tokens, checked; from `datasets`' cache where the same rows were tokenised alike before.

    Args:
        rows: A `datasets.Dataset` or `IterableDataset`.
        tokenizer: A transformers tokenizer.
        overlong: What happens to rows longer than `max_length`: "truncate", "drop" or "raise".
        what: The split's name, for messages.
        num_proc: Processes that tokenise.
        **options: As for `tokenize_row`.

    Raises:
        ValueError: Rows that are too long under "raise", or with nothing to learn under "truncate" and "raise" (counted
            in the message); or no row is left.
    """
    function = partial(tokenize_row, tokenizer=tokenizer, **options)
    columns = rows.column_names
    if not hasattr(rows, "__len__"):
        made = rows.map(_strict(function, overlong, options["max_length"]), remove_columns=columns)
        return made.filter(_is_kept).remove_columns(["length", "learnable"])
    key = f"{rows._fingerprint}:{tokenizer_fingerprint(tokenizer)}:{json.dumps(options, sort_keys=True)}:{_VERSION}"
    made = rows.map(
        function,
        remove_columns=[column for column in columns if column not in options["keep_columns"]],
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        num_proc=num_proc,
        desc=f"tokenising {what} rows",
    )
    return _checked(made, overlong, what, options["max_length"])


def _checked(made: Any, overlong: str, what: str, max_length: int) -> Any:
    columns = made.with_format("numpy")
    length, learnable = np.asarray(columns["length"][:]), np.asarray(columns["learnable"][:])
    long, empty, n = length > max_length, learnable == 0, len(made)
    if overlong == "raise" and long.any():
        raise ValueError(
            f"{_some(long)} of {n} {what} rows are longer than max_length={max_length} (the longest has {length.max()} "
            "tokens): raise max_length, or set overlong='truncate' or 'drop'."
        )
    drop = (long | empty) if overlong == "drop" else np.zeros(n, dtype=bool)
    if (empty & ~drop).any():
        cut, whole = empty & long, empty & ~long
        reasons = [f"in {_some(cut)} the prompt alone fills max_length={max_length}"] if cut.any() else []
        reasons += [f"{_some(whole)} have no assistant's turn or completion"] if whole.any() else []
        every = f"every label of all {n} {what} rows is masked" if empty.all() else f"{n} {what} rows"
        raise ValueError(
            f"{every}: {'; '.join(reasons)}. There is nothing to learn from such rows: raise max_length, mend the "
            "data, or leave them out with overlong='drop'."
        )
    if drop.any():
        rank_zero_info(f"{drop.sum()} of {n} {what} rows are left out: longer than {max_length} or nothing to learn.")
        if drop.all():
            raise ValueError(f"overlong='drop' leaves none of {n} {what} rows: raise max_length={max_length}.")
        made = made.select(np.flatnonzero(~drop))
    elif long.any():
        rank_zero_info(f"{long.sum()} of {n} {what} rows are cut to max_length={max_length}.")
    tokens, learnt = np.minimum(length, max_length)[~drop].sum(), learnable[~drop].sum()
    rank_zero_info(f"{what} data: {len(made)} documents, {tokens} tokens, {learnt} of them learnt.")
    return made.remove_columns(["length", "learnable"])


def _some(chosen: np.ndarray) -> str:
    numbers = np.flatnonzero(chosen)
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} (rows {shown})"


def _is_kept(row: dict[str, Any]) -> bool:
    return row["learnable"] > 0


def _strict(function: Any, overlong: str, max_length: int) -> Any:
    """The checks that a stream allows: row by row, when it comes."""

    def checked(row: dict[str, Any]) -> dict[str, Any]:
        made = function(row)
        long = made["length"] > max_length
        if overlong == "drop" and long:
            return {**made, "learnable": 0}
        if overlong == "raise" and long:
            raise ValueError(f"a row has {made['length']} tokens and max_length={max_length}: see overlong=.")
        if overlong != "drop" and not made["learnable"]:
            raise ValueError(f"a row of {made['length']} tokens has nothing to learn within max_length={max_length}.")
        return made

    return checked


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does, the same in every process.

    `datasets`' own hash of a tokenizer changes when it has padded once.
    """
    from datasets.fingerprint import Hasher

    if getattr(tokenizer, "is_fast", False):
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        inner.pop("padding", None)
        inner.pop("truncation", None)
        content = json.dumps(inner, sort_keys=True)
    else:
        content = Hasher.hash(tokenizer)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content += json.dumps([special, str(tokenizer.chat_template)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
