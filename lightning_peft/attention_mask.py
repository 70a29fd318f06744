"""The attention mask of packed rows: documents that share a row do not see each other."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_attention_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal mask within each document, to add to attention scores.

    Position ids alone leak in transformers 5, and so does a boolean 4-D mask under eager attention (FINDINGS, 16); an
    additive one is exact with "sdpa" and "eager", for every decoder that takes a 4-D mask. It stands for all layers:
    where a network has sliding-window layers, a document is taken to be no longer than the window.

    Args:
        document_ids: Which document each position belongs to, [batch, time]; -1 is padding.
        dtype: A floating type, that of the network.

    Returns:
        [batch, 1, time, time]: 0 where position t (third axis) sees position s (fourth), the type's lowest number
        elsewhere. Padding sees itself only, so that no row of the softmax is empty.
    """
    time = document_ids.shape[1]
    position = torch.arange(time, device=document_ids.device)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    real = (document_ids >= 0)[:, :, None]
    seen = (same & real & (position[:, None] >= position)) | (position[:, None] == position)
    mask = torch.zeros(seen.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
