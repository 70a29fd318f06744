"""Means over units, exact over batches and ranks: `self.log`'s own mean of batch means is not (FINDINGS, 23)."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood; `update(mean, weight=count)` as for `MeanMetric`."""

    def compute(self) -> Tensor:
        return super().compute().exp()


def log_term(
    module: L.LightningModule,
    name: str,
    total: Tensor,
    count: int,
    dataloader_idx: int = 0,
    kind: type[MeanMetric] = MeanMetric,
) -> None:
    """Adds `total` (a sum over `count` units) to the metric `name` of `module` and logs it at the epoch's end."""
    key = f"{name}_{dataloader_idx}" if dataloader_idx else name
    if key not in module.metrics:
        module.metrics[key] = kind().to(module.device)
    metric = module.metrics[key]
    if count:
        metric.update(total.float() / count, weight=torch.tensor(float(count), device=module.device))
    module.log(name, metric, metric_attribute=f"metrics.{key}", prog_bar=name.endswith("_loss"))
