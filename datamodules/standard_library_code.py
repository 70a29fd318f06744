"""Real text that is always there: functions of Python's standard library, from signature and docstring to body."""

from __future__ import annotations

import sys
from typing import Any

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.standard_library import split_of_module, standard_library_functions


class StandardLibraryCode(InstructionData):
    """Docstring to code, from the sources of the Python it runs on: no download, the same in every run.

    A row is a function's signature and docstring as prompt, its body as completion. With a chat template it is a
    conversation of two turns, otherwise prompt and completion. Splits are by module: none is on
    two sides.

    Args:
        instruction: What stands before the signature in the user's turn of a conversation.
        max_examples: Training rows at most, evenly over the library; validation and test keep their proportion.
        max_chars: Characters of a function at most.
        min_chars: Characters of a body at least.
        validation: Fraction of modules (about) held out for validation.
        test: Fraction of modules (about) held out for test.
        tokenizer: As for `InstructionData`.
        max_length: Tokens in a row at most.
        batch_size: Rows in a batch, on each rank.
        overlong: As for `InstructionData`; here rows that are too long are dropped by default.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: Fractions do not leave a training split, or no function fits the limits.
    """

    def __init__(
        self,
        instruction: str = "Write the body of this Python function.",
        max_examples: int | None = None,
        max_chars: int = 1500,
        min_chars: int = 40,
        validation: float = 0.1,
        test: float = 0.1,
        tokenizer: str | Any | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        overlong: str = "drop",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data="the standard library of this Python",
            validation=None,
            test=None,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            overlong=overlong,
            **kwargs,
        )
        if not (validation >= 0 and test >= 0 and validation + test < 1):
            raise ValueError(f"validation={validation} and test={test} must be fractions that add up to less than 1.")
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"max_examples={max_examples} must be at least 1.")
        self.instruction, self.max_examples = instruction, max_examples
        self.max_chars, self.min_chars = max_chars, min_chars
        self.fractions = (validation, test)

    def read(self) -> dict[str, Any]:
        import datasets

        by_split: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
        for row in standard_library_functions(self.max_chars, self.min_chars):
            by_split[split_of_module(row["module"], *self.fractions)].append(self._formatted(row))
        train = len(by_split["train"])
        if not train:
            raise ValueError(
                f"no documented function of Python {sys.version_info[0]}.{sys.version_info[1]} has at most max_chars="
                f"{self.max_chars} and a body of at least min_chars={self.min_chars} characters."
            )
        share = min(1.0, (self.max_examples or train) / train)
        return {
            split: datasets.Dataset.from_list(_evenly(rows, max(1, round(share * len(rows)))))
            for split, rows in by_split.items()
            if rows
        }

    def _formatted(self, row: dict[str, str]) -> dict[str, Any]:
        if self.row_options["chat_template"] or getattr(self.tokenizer, "chat_template", None):
            return {
                "messages": [
                    {"role": "user", "content": f"{self.instruction}\n\n{row['prompt']}".rstrip("\n")},
                    {"role": "assistant", "content": row["completion"].rstrip("\n")},
                ]
            }
        return {"prompt": row["prompt"], "completion": row["completion"]}


def _evenly(rows: list[Any], n: int) -> list[Any]:
    return [rows[i * len(rows) // n] for i in range(min(n, len(rows)))]
