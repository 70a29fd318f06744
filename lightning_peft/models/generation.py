"""What a network writes behind a batch of beginnings of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [batch, time], padded on the left.

    Args:
        rows: Token ids.
        pad: The id to fill up with.
        device: Where they are wanted.
    """
    time = max(map(len, rows))
    ids = torch.tensor([[pad] * (time - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (time - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def continuations(module: Any, rows: list[list[int]], generation: dict[str, Any]) -> list[str]:
    """The text behind each row of token ids, without special tokens.

    Args:
        module: A module with `model` and `tokenizer`.
        rows: Token ids, not padded.
        generation: Arguments of `generate`.
    """
    options = {"pad_token_id": module.tokenizer.pad_token_id, **generation}
    ids, mask = left_padded(rows, options["pad_token_id"], module.device)
    made = module.model.generate(input_ids=ids, attention_mask=mask, **options)
    return module.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
