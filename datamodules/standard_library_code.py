"""Real text that is always there: functions of Python's standard library, from signature and docstring to body."""

from __future__ import annotations

from typing import Any

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.standard_library import check_split, functions_by_split


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
        check_split(validation, test, max_examples)
        self.instruction, self.max_examples = instruction, max_examples
        self.max_chars, self.min_chars = max_chars, min_chars
        self.fractions = (validation, test)

    def read(self) -> dict[str, Any]:
        import datasets

        validation, test = self.fractions
        functions = functions_by_split(validation, test, self.max_examples, self.max_chars, self.min_chars)
        return {
            split: datasets.Dataset.from_list([self._formatted(row) for row in rows])
            for split, rows in functions.items()
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
