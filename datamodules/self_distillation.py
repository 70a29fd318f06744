"""Self-distilled data (paper 1): the network's own answers in place of the data's, for what must not shift it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.datamodules.answers import prompt_ids
from lightning_peft.datamodules.chat_template import as_messages
from lightning_peft.datamodules.model_answers import ModelAnswersData
from lightning_peft.datamodules.sources import Source

UNFINISHED = ("drop", "keep")


class SelfDistillationData(ModelAnswersData):
    """Prompts with the answers that the network in training gives itself, before it is trained.

    Concept-aware fine-tuning pre-trains its auxiliary heads on such data, so that they learn the network as it is
    (arXiv 2506.07833, section on head pre-training). Answers are generated once, in `setup`, by all ranks, and kept in
    Parquet shards keyed by the network's weights, the prompts and the settings; a killed run goes on where it stood.
    Then they are ordinary rows: the prompt masked, the answer and its end-of-turn token learnt.

    Args:
        data: As for `InstructionData`; of a conversation what stands before the last assistant's turn is the prompt.
        generation: Arguments of `generate`; by default greedy, with at most 256 new tokens. Sampling such as
            `{"do_sample": true, "temperature": 0.7}` is seeded by `seed`.
        unfinished: Answers without an end-of-turn token, cut at `max_new_tokens`: "drop" them, or "keep" them (and
            learn to stop there).
        **kwargs: Further arguments of `ModelAnswersData` and `InstructionData`.

    Raises:
        ValueError: No network that generates, prompts that leave no room for an answer, or no answer that is finished.
    """

    cache_name = "self_distillation"

    def __init__(
        self,
        data: Source,
        generation: dict[str, Any] | None = None,
        unfinished: str = "drop",
        **kwargs: Any,
    ) -> None:
        generation = {"max_new_tokens": 256, "do_sample": False, **(generation or {})}
        super().__init__(data=data, generation=generation, **kwargs)
        if unfinished not in UNFINISHED:
            raise ValueError(f"unfinished={unfinished!r} is not known: use 'drop' or 'keep'.")
        self.unfinished = unfinished
        self.row_options |= {"completion_only_loss": True, "assistant_only_loss": True}

    def examples(self, split: str) -> Any:
        import datasets

        rows = super().examples(split)
        carried_columns: Any = self.row_options["keep_columns"]
        template: Any = self.row_options["chat_template"]
        carried = [name for name in ["weight", *carried_columns] if name in rows.column_names]
        asked = [_prompt(row) for row in rows]
        ids = [prompt_ids(self.tokenizer, prompt, template) for prompt in asked]
        long = [i for i, one in enumerate(ids) if len(one) >= self.max_length]
        if long and self.overlong != "drop":
            raise ValueError(
                f"{len(long)} of {len(ids)} {split} prompts (rows {', '.join(map(str, long[:5]))}) fill max_length="
                f"{self.max_length}: there is no room for an answer. Raise max_length, or set overlong='drop'."
            )
        kept = [i for i in range(len(ids)) if len(ids[i]) < self.max_length]
        answers = self.answers([ids[i] for i in kept], self.generation)
        done = [(i, one["answer"]) for i, one in zip(kept, answers) if one["finished"] or self.unfinished == "keep"]
        rank_zero_info(f"{split} data: {len(done)} of {len(ids)} prompts have an answer that is learnt from.")
        if not done:
            raise ValueError(
                f"none of {len(ids)} {split} prompts has a finished answer of at most max_new_tokens="
                f"{self.generation.get('max_new_tokens')}: raise it in generation=, or set unfinished='keep'."
            )
        made = [
            {
                "prompt": asked[i],
                "completion": text if isinstance(asked[i], str) else [{"role": "assistant", "content": text}],
                **{name: rows[i][name] for name in carried},
            }
            for i, text in done
        ]
        return datasets.Dataset.from_list(made)


def _prompt(row: dict[str, Any]) -> str | list[dict[str, Any]]:
    """What a row asks: its prompt, or the turns before the last assistant's."""
    turns = row.get("messages", row.get("conversations"))
    if turns is not None:
        turns = as_messages(turns)
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        if not turns[:last]:
            raise ValueError("a conversation has no turn before the assistant's: there is nothing to answer.")
        return turns[:last]
    if "prompt" in row:
        return row["prompt"] if isinstance(row["prompt"], str) else as_messages(row["prompt"])
    raise ValueError(f"rows have the columns {sorted(row)}: give 'messages' or 'prompt'.")
