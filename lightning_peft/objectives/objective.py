"""The contract every objective stands on: what a technique may say about the loss of one optimizer step.

The step is (ARCHITECTURE, contract 1)

    loss = sum_i w_i nll_i / count  +  sum_k coefficient_k sum_i nll_ki / count_k  +  sum_j numerator_j / count_j

with `w` the product of every objective's `loss_weights`, the second sum over `head_terms` (further hidden states read
by the same output matrix), the third over `auxiliary_losses`; every count is that of the whole optimizer step, over its
micro-batches and ranks. Weights multiply and terms add, so objectives combine in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule, StepTerms

Batch = dict[str, Any]


@dataclass
class HeadTerm:
    """A further loss read through the model's own output matrix, in the same kernel call as the model's own rows.

    Args:
        name: The term's name in logs and counts, unique in a run.
        hidden: Hidden states, shape [batch, time, width]; of a classifier rows [n, width].
        labels: The token each position predicts, shape [batch, time]; -100 where it predicts nothing. Of a
            classifier the class of each row, [n].
        coefficient: What the term's mean is multiplied by in the loss.
        nll: The labelled rows' loss [n], where the term has an output matrix of its own and has already applied it.
    """

    name: str
    hidden: Tensor
    labels: Tensor
    coefficient: float
    nll: Tensor | None = None


@dataclass
class TrunkState:
    """What the network's last block was given, seen from inside the output head's forward.

    An image classifier fills in `final`, shape [batch, width], and `logits` only.

    Args:
        final: The hidden state that the head reads (after the final norm), shape [batch, time, width].
        penultimate: The input of the last transformer block, shape [batch, time, width].
        block_args: The other positional arguments of that block (mask, positions, ...).
        block_kwargs: Its keyword arguments, without caches.
        logits: The head's own forward, from hidden states to logits.
    """

    final: Tensor
    penultimate: Tensor
    block_args: tuple[Any, ...]
    block_kwargs: dict[str, Any]
    logits: Callable[[Tensor], Tensor] | None = None


class Objective:
    """One technique's say in the loss. Override what the technique needs; everything else stays as it is.

    An objective is a plain object: it holds arguments and small state, the module holds the layers it adds. Hand a list
    of them to a `FineTuningModule`, append one from a callback with `module.add_objective`, or use its mixin.
    """

    #: `loss_weights` of a row depends on that row alone. Then the kernel asks for it chunk by chunk and a trainable
    #: head costs three matrix products instead of four. Set False where a weight needs the whole batch.
    rowwise: bool = True

    #: What `loss_weights` reads of its units besides `nll`: any of "entropy" and "is_argmax". Else they are None.
    needs: frozenset[str] = frozenset()

    #: Training leaves the network's own loss out: this objective's terms are all there is (pre-training of heads).
    replaces_main: bool = False

    #: `before_forward` changes what the network reads, so it comes before that of the others, whose passes read it too.
    changes_inputs: bool = False

    def attach(self, module: FineTuningModule) -> None:
        """Adds layers to `module`, or refuses it. Called once, when the network stands and before it is sharded."""

    def on_fit_start(self, module: FineTuningModule) -> None:
        """Checks what only a run can tell (the number of steps, the data), before the first step."""

    def on_train_start(self, module: FineTuningModule) -> None:
        """Passes over data before the first step: loaders stand, and whatever a checkpoint holds is restored."""

    def on_step_end(self, module: FineTuningModule) -> None:
        """After an optimizer step, before the next batch is drawn; a checkpoint may have been written in between."""

    def transform_batch(self, module: FineTuningModule, batch: Batch) -> Batch:
        """The batch to learn from. Runs in the loader, before the counts are taken, on the CPU."""
        return batch

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        """The denominators of this objective's own terms: a pure function of the transformed batch."""
        return {}

    def before_forward(self, module: FineTuningModule, batch: Batch) -> Batch:
        """The batch with what only a pass of its own can tell (a reference's hidden states, a rival's likelihood).

        Called on the device, before the step's forward and outside of any module's; in evaluation too. Under FSDP2
        every rank makes the pass whatever its batch holds.
        """
        return batch

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        """A weight for each unit (token, example or pair), shape [n]; `None` leaves them alone.

        Args:
            module: The module in training.
            batch: The batch, on the device.
            units: Detached `nll`, `labels` and `index`, each [n], and what `needs` names. `index` is the flat position
                in `batch["labels"]` of the unit's *target*: a token-level column is `column.view(-1)[units.index]`.
        """
        return None

    def needs_trunk(self, module: FineTuningModule) -> bool:
        """Whether `head_terms` will want the last block's inputs in this step."""
        return False

    def head_terms(self, module: FineTuningModule, batch: Batch, trunk: TrunkState) -> list[HeadTerm]:
        """Further losses read by the output matrix. Runs inside the head's own forward, where its weight is whole."""
        return []

    def before_head(self, module: FineTuningModule, batch: Batch, hidden: Tensor) -> Tensor:
        """What the head of an `ImageClassifier` reads in training in place of `hidden` [batch, width].

        Runs inside the head's own forward. A technique that needs it refuses other modules in `attach`.
        """
        return hidden

    def auxiliary_losses(self, module: FineTuningModule, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Numerators of further terms, scalars, each divided by its entry in `counts`; coefficients included."""
        return {}

    def on_evaluated(self, module: FineTuningModule, stage: str, terms: StepTerms, dataloader_idx: int) -> None:
        """Metrics of its own from a validation or test batch; `stage` is "val" or "test"."""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: JSON values and tensors only, since Lightning resumes with `weights_only=True`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
