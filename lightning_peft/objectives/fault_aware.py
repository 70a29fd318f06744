"""Fault-aware fine-tuning: the tokens in which a correct program differs from a similar wrong one weigh more.

(FAIT, arXiv 2503.16913; renamed FGIT in its second version.)

    L = -(1/M) sum_t w_t log p(c_t | x, c_<t),    w_t = omega inside the error-sensitive segments of c, 1 elsewhere,

with omega recomputed from the present network's likelihood of the segment in the correct and in the wrong program:
large while the network does not yet prefer the correct one. Which tokens these are stands in the batch, in columns that
`datamodules.FaultPairs` makes: `fault_mask` [batch, time], and the wrong program's `wrong_input_ids`,
`wrong_fault_mask` and `wrong_attention_mask` [batch, wrong time] (packed rows: `wrong_document_ids` and
`wrong_position_ids` instead of the last).

The loss's shape is the paper's; its formula of omega is in no public text or code that we could read. `importance` is
our stand-in, and the only place to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.models.causal_lm import IGNORED, CausalLM
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.samples import group_sums, sample_of

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

_WRONG = "wrong_"


def importance(nll_correct: Tensor, nll_wrong: Tensor, alpha: float = 1.0, tau: float = 1.0) -> Tensor:
    """omega = 1 + alpha * sigmoid((mean nll of the correct segment - mean nll of the wrong segment) / tau).

    From 1 + alpha, while the wrong segment is far more likely, down to 1. (Ours: see the module's docstring.)

    Args:
        nll_correct: Mean nll of each pair's correct segment, any shape.
        nll_wrong: That of its wrong segment.
        alpha: How much a segment can weigh above other tokens; 0 is plain fine-tuning.
        tau: Temperature, in nats a token.
    """
    return 1 + alpha * torch.sigmoid((nll_correct - nll_wrong) / tau)


class FaultAware(Objective):
    """Weights error-sensitive tokens by `importance`, at the cost of a forward of the wrong programs without gradient.

    Pairs of which either segment is empty (cut off) weigh 1. Evaluation rows without a pair are left alone.

    Args:
        fait_alpha: How much a segment can weigh above other tokens; 0 is plain fine-tuning.
        fait_tau: Temperature of its likelihood margin, in nats a token.

    Raises:
        ValueError: An argument is out of range, or a training batch has no pairs.
    """

    def __init__(self, fait_alpha: float = 1.0, fait_tau: float = 1.0) -> None:
        if not fait_alpha >= 0:
            raise ValueError(f"fait_alpha={fait_alpha} must be at least 0.")
        if not fait_tau > 0:
            raise ValueError(f"fait_tau={fait_tau} must be above 0.")
        self.fait_alpha, self.fait_tau = fait_alpha, fait_tau
        self.rowwise = fait_alpha == 0  # omega takes the whole segment

    def before_forward(self, module: Any, batch: Batch) -> Batch:
        """Adds `fault_wrong_nll` [pairs], the mean nll of each wrong segment; NaN where that is empty."""
        if self.fait_alpha == 0 or _WRONG + "input_ids" not in batch:
            return batch
        wrong = {name.removeprefix(_WRONG): value for name, value in batch.items() if name.startswith(_WRONG)}
        wrong["labels"] = torch.where(wrong["fault_mask"] != 0, wrong["input_ids"], IGNORED)
        # In the mode of the step (dropout on or off): the two segments are compared under the same noise.
        with torch.no_grad():
            index, nll = module.row_losses(wrong)
        sums, counts = group_sums(nll, *sample_of(wrong, index, batch["labels"].shape[1]))
        return {**batch, "fault_wrong_nll": sums / counts}

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        if "fault_mask" not in batch or _WRONG + "input_ids" not in batch:
            if module.training:
                raise ValueError(
                    "fault-aware fine-tuning needs pairs of a correct and a wrong program: the batch has no fault_mask "
                    "and wrong_input_ids. Train with datamodules.FaultPairs."
                )
            return None
        if self.fait_alpha == 0:
            return None
        fault = batch["fault_mask"].flatten()[units.index] != 0
        pair, pairs = sample_of(batch, units.index)
        sums, counts = group_sums(units.nll * fault, pair, pairs)
        counts, _ = group_sums(fault.to(units.nll), pair, pairs)
        omega = importance(sums / counts, batch["fault_wrong_nll"], self.fait_alpha, self.fait_tau)
        omega = torch.where(omega.isnan(), 1.0, omega)  # nothing to compare with
        return torch.where(fault, omega[pair], 1.0)


class FaultAwareMixin:
    """Adds `FaultAware` to a `CausalLM`: `class MyModel(FaultAwareMixin, CausalLM)`.

    Args:
        fait_alpha: How much an error-sensitive segment can weigh above other tokens; 0 is plain fine-tuning.
        fait_tau: Temperature of its likelihood margin, in nats a token.
    """

    def __init__(self, *args: Any, fait_alpha: float = 1.0, fait_tau: float = 1.0, **kwargs: Any) -> None:
        objective = FaultAware(fait_alpha, fait_tau)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class FaultAwareCausalLM(FaultAwareMixin, CausalLM):
    """`CausalLM` with fault-aware fine-tuning, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `FaultAwareMixin` and `CausalLM`.
    """
