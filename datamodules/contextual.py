"""Contextual fine-tuning (paper 24, arXiv 2503.09032): a learning strategy stands before each document.

For a document x and a prompt c drawn from a fixed set after theories of learning, the loss is

    - sum_t log p(x_t | c, x_<t),

with c masked: continued pre-training, but for what the network is told to look for. Prompt and document are tokenised
apart, as in the published code (vectorlm), so a document's labels are the same with and without a prompt.

Where that code differs: only a document's first chunk carries the prompt there (`prompt_on="first_chunk"`), and the cut
of an over-long row takes its end, whatever stands there. Its rows came from the split that was then scored; here a
training document that is also held out is refused. The wordings are ours (the repository names the ten strategies and
the paper prints one of them).
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.chat_template import IGNORED, Tokens, tokenize_text
from lightning_peft.datamodules.rewriting import REWRITTEN, Rewriting, RewrittenData, Row, leading_tokens, mapped
from lightning_peft.datamodules.sources import Source
from lightning_peft.datamodules.tokenized import OVERLONG, tokenizer_fingerprint

#: The learning strategies of the published generator, by its names, in words of our own.
PROMPTS = {
    "application": "As you read what follows, think of where it could be put to use, and what using it would change.",
    "in-depth exploration": "Go below the surface of the following text: ask how each statement comes about and what "
    "holds it up.",
    "reflection": "Hold the next passage against what you know already. What does it confirm, what does it correct?",
    "creative interpretation": "Find an image or a story of your own for the ideas in the text below, and keep it in "
    "mind while you read.",
    "synthesis": "Bring the pieces of the following text together, with one another and with neighbouring subjects, "
    "until they make one picture.",
    "key concepts": "Pick out the few concepts that the text below rests on and see how everything else follows from "
    "them.",
    "context": "Place the following text: what led to it, whom does it concern, and what would be different elsewhere?",
    "critical analysis": "Weigh the next text as a critic would: which claims are supported, which are assumed, and "
    "what speaks against them?",
    "questions": "Read the following with questions ready. What would you ask its author, and where does the text "
    "answer you?",
    "comparison": "Compare what the text below describes with its alternatives: what do they share and where do they "
    "part?",
}
PROMPT_ON = ("every_chunk", "first_chunk")


class ContextualPromptTransform(Rewriting):
    """Puts a learning strategy in front of a document; the document is learnt, the strategy is not.

    Which one is drawn from the seed, the epoch and the document. A row is cut at its end, so of the document alone.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: The strategies: a list, or a list for each domain; by default the ten of `PROMPTS`. An empty one
            gives continued pre-training.
        max_length: Tokens in a row at most.
        loss_on_prompt: Learn the strategy too.
        prompt_on: Of a document cut in chunks, "every_chunk" carries a strategy, or the "first_chunk".
        separator: What stands between strategy and document.
        domain_column: The column that names a row's domain, where `prompts` has several.
        prompt_column: A column with each document's own strategy, such as one written by a larger model for it; rows
            that have none draw one.
        seed: Seed of the draws.

    Raises:
        ValueError: No prompts, an unknown domain, or a prompt that leaves no room for its document.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: list[str] | dict[str, list[str]] | None = None,
        max_length: int | None = None,
        loss_on_prompt: bool = False,
        prompt_on: str = "every_chunk",
        separator: str = "\n\n",
        domain_column: str = "domain",
        prompt_column: str | None = None,
        seed: int = 0,
    ) -> None:
        if prompt_on not in PROMPT_ON:
            raise ValueError(f"prompt_on={prompt_on!r} is not known: use 'every_chunk' or 'first_chunk'.")
        prompts = list(PROMPTS.values()) if prompts is None else prompts
        for own in prompts.values() if isinstance(prompts, dict) else [prompts]:
            if not own or not all(isinstance(prompt, str) for prompt in own):
                raise ValueError(f"prompts={own!r} must be a list of texts, at least one (an empty one for none).")
        self.tokenizer, self.prompts, self.max_length, self.seed = tokenizer, prompts, max_length, seed
        self.loss_on_prompt, self.prompt_on, self.separator = loss_on_prompt, prompt_on, separator
        self.domain_column, self.prompt_column = domain_column, prompt_column
        self.leading = len(leading_tokens(tokenizer))
        self._ids: dict[str, list[int]] = {}

    def rewrite(self, row: Row, epoch: int) -> Row:
        document = document_tokens(self.tokenizer, row)
        ids, labels = document["input_ids"], document["labels"]
        prompt = self._prompt(row, epoch, np.asarray(ids, dtype=np.int64).tobytes())
        learnt = prompt if self.loss_on_prompt else [IGNORED] * len(prompt)
        cut = self.leading  # a beginning-of-text token stays in front
        ids, labels = ids[:cut] + prompt + ids[cut:], labels[:cut] + learnt + labels[cut:]
        if self.max_length is not None and cut + len(prompt) >= self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens fills max_length={self.max_length}: there is no room for the "
                "document. Raise max_length, or give shorter prompts."
            )
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def candidates(self, row: Row) -> list[str]:
        """The strategies that a row draws from."""
        if self.prompt_column is not None and row.get(self.prompt_column):
            return [row[self.prompt_column]]
        if not isinstance(self.prompts, dict):
            return self.prompts
        domain = row.get(self.domain_column)
        if domain not in self.prompts:
            raise ValueError(
                f"a row's {self.domain_column!r} is {domain!r}, and prompts has the domains {sorted(self.prompts)}."
            )
        return self.prompts[domain]

    def longest(self, row: Row) -> int:
        """Tokens of the longest strategy that a row may draw, separator included."""
        return max(len(self._tokens(prompt)) for prompt in self.candidates(row))

    def _prompt(self, row: Row, epoch: int, document: bytes) -> list[int]:
        if row.get("chunk") and self.prompt_on == "first_chunk":
            return []
        return self._tokens(self.draws(epoch, document).choice(self.candidates(row)))

    def _tokens(self, prompt: str) -> list[int]:
        if not prompt:
            return []
        if prompt not in self._ids:
            ids = list(self.tokenizer(prompt + self.separator, add_special_tokens=False)["input_ids"])
            if self.prompt_column is not None:
                return ids  # a document's own: it does not come again
            self._ids[prompt] = ids
        return self._ids[prompt]


def document_tokens(tokenizer: Any, row: Row) -> Tokens:
    """A document as continued pre-training learns it: `text`, or prompt and completion as one text.

    Args:
        tokenizer: A transformers tokenizer.
        row: The document, perhaps tokenised already.

    Raises:
        ValueError: The row is no document.
    """
    if "input_ids" in row and "labels" in row:
        return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}
    text = row.get("text")
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        text = row["prompt"] + row["completion"]
    if not isinstance(text, str):
        raise ValueError(f"rows have the columns {sorted(row)}: a document is 'text', or 'prompt' and 'completion'.")
    if not text.strip():
        raise ValueError("a document is empty: there is nothing to learn from it.")
    return tokenize_text(tokenizer, text)


class ContextualData(RewrittenData):
    """Documents to train on further, each behind a learning strategy.

    Validation and test documents have none, so their loss compares with continued pre-training.

    Args:
        data: As for `InstructionData`: rows with `text` (or prompt and completion, taken as one text).
        prompts: The strategies: a list, or a list for each domain; by default ten after theories of learning.
        sampling: Draw a strategy "per_epoch", anew in every epoch, or "per_example", once for each document (as packing
            and streaming need it).
        loss_on_prompt: Learn the strategies too.
        prompt_on: Of a document cut in chunks, "every_chunk" carries a strategy, or the "first_chunk".
        separator: What stands between strategy and document.
        domain_column: The column that names a row's domain, where `prompts` has several.
        prompt_column: A column with each document's own strategy.
        overlong: Documents that do not fit: "chunk" learns all of them, in even parts; "truncate", "drop", "raise" as
            for `InstructionData`.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: As `ContextualPromptTransform`; or a training document is also held out.
    """

    def __init__(
        self,
        data: Source,
        prompts: list[str] | dict[str, list[str]] | None = None,
        sampling: str = "per_epoch",
        loss_on_prompt: bool = False,
        prompt_on: str = "every_chunk",
        separator: str = "\n\n",
        domain_column: str = "domain",
        prompt_column: str | None = None,
        overlong: str = "chunk",
        **kwargs: Any,
    ) -> None:
        if overlong not in ("chunk", *OVERLONG):
            known = ", ".join(map(repr, ("chunk", *OVERLONG)))
            raise ValueError(f"overlong={overlong!r} is not known: use one of {known}.")
        cut = "truncate" if overlong == "chunk" else overlong
        super().__init__(data=data, sampling=sampling, overlong=cut, **kwargs)
        self.overlong_documents = overlong
        self.arguments: dict[str, Any] = {
            "prompts": prompts,
            "max_length": self.max_length,
            "loss_on_prompt": loss_on_prompt,
            "prompt_on": prompt_on,
            "separator": separator,
            "domain_column": domain_column,
            "prompt_column": prompt_column,
            "seed": self.seed,
        }

    def read(self) -> dict[str, Any]:
        splits = super().read()
        if self.streaming:
            return splits
        learnt = {_digest(row) for row in splits["train"]}
        for split, rows in splits.items():
            held_out = sum(_digest(row) in learnt for row in rows) if split != "train" else 0
            if held_out:
                raise ValueError(
                    f"{held_out} of {len(rows)} {split} documents are also trained on: what is measured on them means "
                    "nothing. Leave them out of one side."
                )
        return splits

    def originals(self, split: str) -> Any:
        rows, transform = super().originals(split), self._transform()
        keep: Any = self.row_options["keep_columns"]
        options: dict[str, Any] = {
            "carried": ["weight", REWRITTEN, *keep, self.arguments["domain_column"], self.arguments["prompt_column"]],
            "max_length": self.max_length,
            "overlong": self.overlong_documents,
        }
        key = [tokenizer_fingerprint(self.tokenizer), options, split == "train" and transform.fingerprint()]
        documents = partial(_documents, transform=transform, prompted=split == "train", **options)
        made = mapped(rows, documents, json.dumps(key), batched=True, batch_size=100)
        if self.overlong_documents == "drop":
            made = made.filter(_fits)
        if hasattr(made, "__len__"):
            rank_zero_info(f"{split} data: {len(rows)} documents, {len(made)} parts of them.")
            if not len(made):
                raise ValueError(f"overlong='drop' leaves none of {len(rows)} {split} documents: raise max_length.")
        return made

    def rewriting(self, split: str) -> ContextualPromptTransform | None:
        return self._transform() if split == "train" else None

    def _transform(self) -> ContextualPromptTransform:
        return ContextualPromptTransform(self.tokenizer, **self.arguments)


def _documents(
    batch: dict[str, list[Any]],
    transform: ContextualPromptTransform,
    prompted: bool,
    carried: list[str],
    max_length: int,
    overlong: str,
) -> dict[str, list[Any]]:
    """Rows of texts as rows of tokens that fit `max_length` together with any of their prompts."""
    made: list[Row] = []
    for number in range(len(next(iter(batch.values())))):
        row = {name: column[number] for name, column in batch.items()}
        ids = document_tokens(transform.tokenizer, row)["input_ids"]
        room = max_length - (transform.longest(row) if prompted else 0) - transform.leading
        if room < 2:
            raise ValueError(
                f"a prompt of {transform.longest(row)} tokens fills max_length={max_length}: there is no room for the "
                "document. Raise max_length, or give shorter prompts."
            )
        front, body = ids[: transform.leading], ids[transform.leading :]
        if len(body) > room and overlong == "raise":
            raise ValueError(
                f"a document has {len(body)} tokens, and behind its prompt max_length={max_length} leaves {room}: "
                "raise max_length, or set overlong='chunk', 'truncate' or 'drop'."
            )
        parts = -(-len(body) // room) if overlong == "chunk" else 1
        borders = [len(body) * part // parts for part in range(parts + 1)]
        kept = {name: row[name] for name in carried if name in row}
        for part in range(parts):
            tokens = front + body[borders[part] : borders[part + 1]]
            made.append({"input_ids": tokens, "labels": tokens, "chunk": part, "fits": len(body) <= room, **kept})
    return {name: [row[name] for row in made] for name in made[0]}


def _fits(row: Row) -> bool:
    return row["fits"]


def _digest(row: Row) -> bytes:
    content = [row.get("text"), row.get("prompt"), row.get("completion")]
    return hashlib.sha256(json.dumps(content).encode()).digest()
