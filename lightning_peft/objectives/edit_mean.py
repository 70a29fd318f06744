"""The loss of model editing: the mean over an edit's tokens, then over edits (paper 34, arXiv 2509.22072)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_peft.objectives.objective import Batch, Objective
from lightning_peft.objectives.samples import sample_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule

IGNORED = -100


class EditMean(Objective):
    """Weights a token by N / (E n_e): N tokens and E edits in the optimizer step, n_e tokens of its own edit.

    An edit is a row. The sum over N that a `CausalLM` takes is then the mean over edits of their own means, over
    micro-batches and ranks.
    """

    rowwise = False

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        return {"edits": int((batch["labels"][:, 1:] != IGNORED).any(1).sum())}

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        known = module._step_counts if module.training else {}
        counts = known if "edits" in known else module.counts(batch)
        own, edits = sample_of(batch, units.index)
        lengths = torch.bincount(own, minlength=edits).to(units.nll)
        total = torch.as_tensor(counts["loss"]).to(units.nll) / torch.as_tensor(counts["edits"]).to(units.nll)
        return total / lengths[own]
