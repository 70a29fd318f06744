"""FSDP2 for a fine-tuning module: each transformer block its own group, the rest of the network the root's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as L


def shard(module: L.LightningModule, mesh: Any) -> None:
    """Shards every child of `module` over the mesh's "data_parallel" dimension, blocks first.

    The output head and the embeddings stay in the root's group: they may be tied, and the loss runs inside the head's
    own forward, where the root has gathered its weights (FINDINGS, 7).
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from lightning_peft.roles import transformer_blocks

    data_parallel = mesh["data_parallel"]
    if data_parallel.size() == 1:
        return
    for child in module.children():
        if isinstance(child, FSDPModule) or not any(True for _ in child.parameters()):
            continue
        if child is module.model:
            for _, block in transformer_blocks(child):
                fully_shard(block, mesh=data_parallel)
        # Backward prefetch and resharding are torch's defaults: they suit one forward and one backward a micro-batch.
        fully_shard(child, mesh=data_parallel)
