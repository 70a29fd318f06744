"""Dynamic fine-tuning: each token's cross-entropy times its own probability (DFT, arXiv 2508.05629).

    L = sum_t sg(p_t) nll_t / M,    p_t = exp(-nll_t),    M the number of supervised tokens of the optimizer step

The weight is a constant, so a token's gradient is -p_t grad log p_t = -grad p_t: what is learnt is to raise the
target's probability rather than its logarithm, and tokens that the network holds for impossible stop dominating the
step. M is the number of tokens, not the sum of weights.

The paper names a limit: where the answer is single and the network lacks it (plain facts), DFT learns less than
cross-entropy, for it hardly moves tokens of low probability.

Where the published code (`fsdp_dft_trainer.py`) departs from the equation, the equation is kept: there micro-batches
are averaged each by its own count and summed, and the sequence-parallel path does not weight at all. TRL's
`loss_type="dft"` computes the same as this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.objectives.objective import Objective

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch


def dynamic_fine_tuning_weights(nll: Tensor, floor: float = 0.0) -> Tensor:
    """max(p, floor) of each token, a constant to autograd.

    Args:
        nll: Negative log-likelihood of the targets, any shape.
        floor: Least weight. 0 is the paper's; its offline reinforcement form (`raft_scale` in the published code) has
            0.1, with advantages as the data's `weight`.

    Returns:
        Weights in [floor, 1], of the shape of `nll`.
    """
    return nll.detach().neg().exp().clamp(min=floor)  # sg(max(p, floor))


class DynamicFineTuning(Objective):
    """Weights each token by its own probability; `train_nll` and `val_nll` are the plain cross-entropy beside it.

    Args:
        dft_floor: Least weight of a token, in [0, 1].

    Raises:
        ValueError: `dft_floor` is not in [0, 1].
    """

    def __init__(self, dft_floor: float = 0.0) -> None:
        if not 0 <= dft_floor <= 1:
            raise ValueError(f"dft_floor={dft_floor} must be in [0, 1]: 0 is the paper's, 1 plain cross-entropy.")
        self.dft_floor = dft_floor

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor:
        return dynamic_fine_tuning_weights(units.nll, self.dft_floor)


class DynamicFineTuningMixin:
    """Adds `DynamicFineTuning` to a `FineTuningModule`: `class MyModel(DynamicFineTuningMixin, CausalLM)`.

    Args:
        dft_floor: Least weight of a token, in [0, 1]; 0 is the paper's.
    """

    def __init__(self, *args: Any, dft_floor: float = 0.0, **kwargs: Any) -> None:
        objective = DynamicFineTuning(dft_floor)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class DynamicFineTuningCausalLM(DynamicFineTuningMixin, CausalLM):
    """`CausalLM` with dynamic fine-tuning, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `DynamicFineTuningMixin` and `CausalLM`.
    """
