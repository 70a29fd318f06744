"""Means over units, exact over batches and ranks: `self.log`'s own mean of batch means is not (FINDINGS, 23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood; `update(mean, weight=count)` as for `MeanMetric`."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class MultiTokenLoss(Metric):
    """sum_k alpha^k L_k over all heads, k = 0 included, each L_k exact over batches and ranks.

    The published code stops early on it as `real_eval_loss` (alpha 0.8, no beta).

    Args:
        heads: Number of heads, the network's own included.
        decay: alpha.
    """

    higher_is_better = False

    def __init__(self, heads: int, decay: float = 0.8) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(heads), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(heads), dist_reduce_fx="sum")
        self.register_buffer("decays", decay ** torch.arange(heads, dtype=torch.float32), persistent=False)

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Adds each head's summed nll [heads] over its number of labels [heads]."""
        self.sums += sums
        self.counts += counts

    def losses(self) -> Tensor:
        """L_k of every head, [heads]; 0 for a head without a label."""
        sums: Any = self.sums
        return sums / self.counts.clamp(min=1)

    def compute(self) -> Tensor:
        return (self.losses() * self.decays).sum()


def metric_of(module: Any, key: str, make: Callable[[], Metric]) -> Any:
    """The module's metric `key`, made on first use and ready for `update`.

    `Trainer.validate` resets metrics in inference mode, and what is made there cannot be added to by the validation of
    a later `fit`: such states are replaced by copies.
    """
    if key not in module.metrics:
        module.metrics[key] = make().to(module.device)
    metric = module.metrics[key]
    if not torch.is_inference_mode_enabled():
        for name in metric._defaults:
            state = getattr(metric, name)
            if isinstance(state, Tensor) and state.is_inference():
                setattr(metric, name, state.clone())
    return metric


def log_term(
    module: Any,
    name: str,
    total: Tensor,
    count: int,
    dataloader_idx: int = 0,
    kind: type[MeanMetric] = MeanMetric,
) -> None:
    """Adds `total` (a sum over `count` units) to the metric `name` of `module` and logs it at the epoch's end."""
    key = f"{name}_{dataloader_idx}" if dataloader_idx else name
    metric = metric_of(module, key, kind)
    if count:
        metric.update(total.float() / count, weight=torch.tensor(float(count), device=module.device))
    module.log(name, metric, metric_attribute=f"metrics.{key}", prog_bar=name.endswith("_loss"))
