"""Folders of tiny models: a base and networks fine-tuned from it, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import tiny_llama


def tuned(network: torch.nn.Module, seed: int, size: float = 0.02) -> torch.nn.Module:
    """Moves every weight: a part that all seeds share and one of its own, so that angles are about 60 degrees."""
    shared, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            step = torch.randn(weight.shape, generator=shared) + torch.randn(weight.shape, generator=own)
            weight.add_(size * step.to(weight.dtype))
    return network


def save_models(root: Path, n: int = 2, size: float = 0.02, dtype: torch.dtype = torch.float32, **kwargs) -> list[str]:
    """The folders of the base and of `n` models, in shards of different sizes."""
    folders = []
    for k in range(n + 1):
        network = tiny_llama(**kwargs).to(dtype)
        if k:
            network = tuned(network, k, size)
        folder = root / ("base" if k == 0 else f"tuned{k}")
        network.save_pretrained(folder, max_shard_size="40KB" if k != 1 else "10GB")
        folders.append(str(folder))
    return folders
