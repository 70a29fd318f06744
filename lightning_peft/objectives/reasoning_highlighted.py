"""Reasoning-highlighted fine-tuning: reasoning and boilerplate tokens as two losses, weighted by how hard they are.

(RFT, arXiv 2412.14780; ACL 2025 Findings 1078. Not rejection-sampling fine-tuning, nor reinforcement fine-tuning.)

    L = w_b L_b + w_r L_r,    (w_b, w_r) = softmax([L_b, L_r] / tau), constants to autograd,

with L_b and L_r the mean losses of boilerplate and of reasoning tokens. Which token is which stands in the batch's
`reasoning_mask` [batch, time] (1 is reasoning, aligned with the token, not with the position that predicts it);
`datamodules.ShuffleDiscriminatedData` makes it by shuffle-aware discrimination (SHAD, the paper's first half).

As a weight of each token, with n the tokens of the scope and n_g those of the token's group: w_g n / n_g. The weights
of a scope have mean 1 and M stays the denominator, so an example counts by its tokens, as in plain fine-tuning.

No code is published. Where the abstract and public summaries leave a choice, it is ours: the scope of the two losses
(an example by default), their being means rather than totals, and tau 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.samples import group_sums, sample_of

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

SCOPES = ("sample", "micro_batch", "step")
REDUCTIONS = ("mean", "sum")


def reasoning_weights(
    sums: Tensor, counts: Tensor, tau: float = 2.0, reduction: str = "mean", reasoning_weight: float | None = None
) -> Tensor:
    """The weight of a token of each group.

    Args:
        sums: Summed nll of boilerplate and reasoning tokens in each scope, [scopes, 2].
        counts: Their numbers, [scopes, 2].
        tau: Temperature of the softmax; infinite gives 1/2 and 1/2.
        reduction: "mean": L_g is a mean; "sum": a total.
        reasoning_weight: w_r, in place of the softmax.

    Returns:
        [scopes, 2]; where one group is empty, the other's w is 1.
    """
    losses = sums / counts.clamp(min=1) if reduction == "mean" else sums
    if reasoning_weight is None:
        # (w_b, w_r) = softmax([L_b, L_r] / tau) over the groups that are there
        logits = torch.where(counts > 0, losses / tau, torch.finfo(losses.dtype).min)
        w = logits.softmax(dim=1)
    else:
        w = losses.new_tensor([1 - reasoning_weight, reasoning_weight]).expand_as(losses)
        w = torch.where(counts.prod(dim=1, keepdim=True) > 0, w, 1.0)
    if reduction == "sum":
        return w
    return w * counts.sum(dim=1, keepdim=True) / counts.clamp(min=1)  # w_g n / n_g


class ReasoningHighlighted(Objective):
    """Weights reasoning and boilerplate tokens by the softmax of their losses.

    The two losses are of plain cross-entropy, whatever else weights the tokens.

    Args:
        rft_tau: Temperature; the paper's sweep is flat between 2 and 5.
        rft_scope: Over what the two losses are taken: "sample" (an example or packed document), "micro_batch" (on each
            rank), or "step" (over all ranks; without accumulation, for later micro-batches are not yet known).
        rft_reduction: "mean", or "sum" for totals.
        rft_reasoning_weight: A fixed w_r in [0, 1] in place of the softmax (the paper's ablation).

    Raises:
        ValueError: An argument is out of range, or "step" meets accumulation.
    """

    rowwise = False

    def __init__(
        self,
        rft_tau: float = 2.0,
        rft_scope: str = "sample",
        rft_reduction: str = "mean",
        rft_reasoning_weight: float | None = None,
    ) -> None:
        if not rft_tau > 0:
            raise ValueError(f"rft_tau={rft_tau} must be above 0.")
        if rft_scope not in SCOPES:
            raise ValueError(f"rft_scope={rft_scope!r} is not known: use one of {SCOPES}.")
        if rft_reduction not in REDUCTIONS:
            raise ValueError(f"rft_reduction={rft_reduction!r} is not known: use one of {REDUCTIONS}.")
        if rft_reasoning_weight is not None and not 0 <= rft_reasoning_weight <= 1:
            raise ValueError(f"rft_reasoning_weight={rft_reasoning_weight} must be in [0, 1].")
        self.rft_tau, self.rft_scope, self.rft_reduction = rft_tau, rft_scope, rft_reduction
        self.rft_reasoning_weight = rft_reasoning_weight

    def on_fit_start(self, module: FineTuningModule) -> None:
        self._check_accumulation(module)

    def _check_accumulation(self, module: FineTuningModule) -> None:
        if self.rft_scope == "step" and module._trainer is not None and module.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "rft_scope='step' needs the losses of the whole step before its first backward, and "
                f"accumulate_grad_batches={module.trainer.accumulate_grad_batches}: use larger batches, or "
                "rft_scope='sample'."
            )

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        mask = batch.get("reasoning_mask")
        if mask is None:
            if module.training:
                raise ValueError(
                    "reasoning-highlighted fine-tuning needs a reasoning_mask in the batch: train with "
                    "datamodules.ShuffleDiscriminatedData, or name a column of your own in "
                    "InstructionData(token_columns=['reasoning_mask'])."
                )
            return None
        if mask.shape != batch["labels"].shape:
            raise ValueError(
                f"reasoning_mask has shape {tuple(mask.shape)} and labels {tuple(batch['labels'].shape)}: they must be "
                "equal, token by token."
            )
        scope, scopes = torch.zeros_like(units.index), 1
        if self.rft_scope == "sample":
            scope, scopes = sample_of(batch, units.index)
        group = scope * 2 + mask.flatten()[units.index].ne(0)
        sums, counts = group_sums(units.nll, group, 2 * scopes)
        if self.rft_scope == "step" and module.training and module._trainer is not None:
            self._check_accumulation(module)
            sums, counts = module.trainer.strategy.reduce(torch.stack([sums, counts]), reduce_op="sum").unbind()
        weights = reasoning_weights(
            sums.view(-1, 2), counts.view(-1, 2), self.rft_tau, self.rft_reduction, self.rft_reasoning_weight
        )
        return weights.flatten()[group]


class ReasoningHighlightedMixin:
    """Adds `ReasoningHighlighted` to a `CausalLM`: `class MyModel(ReasoningHighlightedMixin, CausalLM)`.

    Args:
        rft_tau: Temperature; the paper's sweep is flat between 2 and 5.
        rft_scope: Over what the two losses are taken: "sample", "micro_batch" or "step".
        rft_reduction: "mean", or "sum" for totals.
        rft_reasoning_weight: A fixed weight of reasoning in [0, 1] in place of the softmax.
    """

    def __init__(
        self,
        *args: Any,
        rft_tau: float = 2.0,
        rft_scope: str = "sample",
        rft_reduction: str = "mean",
        rft_reasoning_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        objective = ReasoningHighlighted(rft_tau, rft_scope, rft_reduction, rft_reasoning_weight)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class ReasoningHighlightedCausalLM(ReasoningHighlightedMixin, CausalLM):
    """`CausalLM` with reasoning-highlighted fine-tuning, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `ReasoningHighlightedMixin` and `CausalLM`.
    """
