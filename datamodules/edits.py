"""Facts to be edited into a network, in the formats of zsRE, CounterFact and WikiBigEdit (paper 34)."""

from __future__ import annotations

from typing import Any

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.sources import Source

ORDERS = ("breadth", "depth")
#: Our name -> names that the data sets have for it.
NAMES = {
    "prompt": ("prompt", "src", "update"),
    "target_new": ("target_new", "alt", "ans", "answers"),
    "rephrase": ("rephrase", "rephrase_prompt", "paraphrase_prompts"),
    "locality": ("locality", "locality_prompt", "loc", "neighborhood_prompts"),
}


def as_edit(row: dict[str, Any]) -> dict[str, Any]:
    """An edit with `prompt`, `target_new`, `rephrase` and `locality` (the last two may be `None`).

    Of several rephrased or unrelated prompts the first is taken; "{}" in a prompt is the row's `subject`.

    Args:
        row: As in zsRE (`src`, `alt`, `rephrase`, `loc`), CounterFact (`requested_rewrite`, `paraphrase_prompts`,
            `neighborhood_prompts`), WikiBigEdit (`update`, `ans`, `rephrase`, `loc`), or under our own names.

    Raises:
        ValueError: The row has no prompt or no target.
    """
    given = {**row, **(row.get("requested_rewrite") or {})}
    made: dict[str, Any] = {}
    for name, known in NAMES.items():
        value = next((given[key] for key in known if given.get(key) not in (None, "", [])), None)
        value = value[0] if isinstance(value, list) else value
        value = value["str"] if isinstance(value, dict) else value
        if value is not None and name != "target_new" and "{}" in str(value):
            value = str(value).format(given.get("subject", ""))
        made[name] = None if value is None else str(value).strip()
    for name in ("prompt", "target_new"):
        if not made[name]:
            raise ValueError(
                f"an edit has the columns {sorted(row)} and no {name} (or an empty one): it needs one of "
                f"{', '.join(NAMES[name])}."
            )
    return made


def edit_text(row: dict[str, Any]) -> dict[str, str]:
    """The edit as prompt and completion: a space, the new target, and behind it the tokenizer's end of text."""
    edit = as_edit(row)
    return {"prompt": edit["prompt"], "completion": f" {edit['target_new']}"}


class EditData(InstructionData):
    """Edits as training rows: of each the target and its end of text are learnt.

    Args:
        data: As for `InstructionData`; rows as for `as_edit`.
        order: "breadth" shuffles all edits every epoch; "depth" is the older way, for comparison: one edit after the
            other, each `depth_steps` times, in a batch of its own. (`LocalizedEditing` takes no step on an edit that is
            learnt already.)
        depth_steps: Steps for each edit under "depth".
        batch_size: Edits in a batch, on each rank.
        overlong: As for `InstructionData`; an edit is not cut.
        **kwargs: Further arguments of `InstructionData`; no packing.

    Raises:
        ValueError: A row is no edit, a target has no token, or an argument does not fit.
    """

    def __init__(
        self,
        data: Source,
        order: str = "breadth",
        depth_steps: int = 25,
        batch_size: int = 100,
        overlong: str = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, batch_size=batch_size, overlong=overlong, **kwargs)
        if order == "depth":
            self.batch_size, self.shuffle = 1, False
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is not known: use one of {ORDERS}.")
        if depth_steps < 1:
            raise ValueError(f"depth_steps={depth_steps} must be at least 1.")
        if self.packing:
            raise ValueError("packing would mix edits in a row, and an edit is a row: leave it off.")
        self.order, self.depth_steps = order, depth_steps

    def examples(self, split: str) -> Any:
        rows = super().examples(split)
        made = rows.map(edit_text, remove_columns=[c for c in rows.column_names if c not in ("prompt", "completion")])
        if self.order == "depth" and split == "train":
            made = made.select([i for i in range(len(made)) for _ in range(self.depth_steps)])
        return made
