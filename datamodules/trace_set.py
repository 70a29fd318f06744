"""Questions with all their reasoning traces in one batch, on one rank (for `SetSupervised`, paper 33)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_peft.datamodules.chat_template import IGNORED, as_messages
from lightning_peft.datamodules.collate import TokenRows, collate, collator
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex
from lightning_peft.datamodules.sources import Source


class TraceSetCollator:
    """From questions to a batch with a row for each trace and `question_id` [rows].

    Args:
        pad_token_id: As for `collate`.
        pad_to_multiple_of: As for `collate`.
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for question in questions:
            if "question_id" not in question or not question.get("traces"):
                raise ValueError(
                    f"a question has the keys {sorted(question)}: it needs question_id, a number, and traces, "
                    "tokenised rows of which there is at least one."
                )
            own = {"question_id": int(question["question_id"])}
            rows += [{**trace, **own} for trace in question["traces"]]
        return collate(rows, self.pad_token_id, self.pad_to_multiple_of)


class TraceSets(TokenRows):
    """Tokenised traces as a data set of questions.

    Args:
        dataset: Traces with `input_ids`, `labels` and `question_id`.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        ids = np.asarray(self.dataset["question_id"][:])
        self.questions, which = np.unique(ids, return_inverse=True)
        self.traces = [np.flatnonzero(which == number).tolist() for number in range(len(self.questions))]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        traces = [dict(self.dataset[row]) for row in self.traces[index]]
        if isinstance(index, RepeatedIndex):
            traces = [{**trace, "labels": np.full_like(trace["labels"], IGNORED)} for trace in traces]
        return {"question_id": int(self.questions[index]), "traces": traces}


class TraceSetData(InstructionData):
    """Questions with several traces each, the traces written behind a tag.

    A row is a question: `prompt` (a text, or messages) and `traces`, a list of texts. Or it is one trace: `prompt`,
    `completion` and the question's number or name in `question_column`. What is read of a trace is

        prompt (messages through the chat template, with its generation prompt)  tag_text  trace  end of text

    and only the trace is learnt. `SetSupervised` puts another tag in the place of this one as it sees fit.

    Args:
        data: As for `InstructionData`.
        tag_text: What stands between prompt and trace, with one of the tags in it. The published network was evaluated
            with `<|im_start|><think1>` and a newline.
        question_column: Where rows are single traces, the column that says which belong together.
        batch_size: Questions in a batch, on each rank.
        **kwargs: Further arguments of `InstructionData`; no packing and no streaming.

    Raises:
        ValueError: Rows have neither traces nor the question's column, or packing or streaming is asked for.
    """

    def __init__(
        self,
        data: Source,
        tag_text: str = "<think1>\n",
        question_column: str = "question_id",
        batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, batch_size=batch_size, **kwargs)
        if self.packing or self.streaming:
            raise ValueError("packing and streaming would part the traces of a question: leave both off.")
        self.tag_text, self.question_column = tag_text, question_column
        self.row_options |= {"completion_only_loss": True, "keep_columns": ("question_id",)}

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        columns = set(rows.column_names)
        if "prompt" not in columns or not ({"traces"} <= columns or {"completion", self.question_column} <= columns):
            raise ValueError(
                f"rows have the columns {sorted(columns)}: give 'prompt' and 'traces', or 'prompt', 'completion' and "
                f"the question's id in {self.question_column!r} (question_column=)."
            )
        numbers: dict[Any, int] = {}
        made = []
        for place, row in enumerate(rows):
            own = row["traces"] if "traces" in columns else [row["completion"]]
            if not own:
                raise ValueError(f"the question in row {place} of the {split} data has no trace.")
            name = place if "traces" in columns else row[self.question_column]
            number = numbers.setdefault(name, len(numbers))
            prompt = self._rendered(row["prompt"]) + self.tag_text
            made += [{"prompt": prompt, "completion": trace, "question_id": number} for trace in own]
        return datasets.Dataset.from_list(made)

    def _rendered(self, prompt: str | list[dict[str, Any]]) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer, template = self.tokenizer, self.row_options["chat_template"]
        options: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(as_messages(prompt), **options)
        # A beginning that the tokenizer puts in front by itself must not stand there twice.
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else text

    def token_rows(self, documents: Any, bins: list[list[int]] | None) -> TraceSets:
        return TraceSets(documents)

    def collate_fn(self) -> TraceSetCollator:
        pad = collator(self.tokenizer).keywords["pad_token_id"]
        return TraceSetCollator(pad, self.pad_to_multiple_of)
