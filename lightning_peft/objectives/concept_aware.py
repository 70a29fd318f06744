"""Concept-aware fine-tuning: multi-token prediction brought to post-training (CAFT, arXiv 2506.07833).

Auxiliary heads k = 1 ... n-1 predict x_{t+1+k} beside the network's own head (k = 0), are trained once per base and
then only lend their gradient to the trunk:

    L(s) = L_0 + beta * gamma(s) * sum_{k=1}^{n-1} alpha^k L_k

with L_k the mean over head k's own valid labels and gamma a schedule over optimizer steps (default the reflected sine,
so that the last steps are pure next-token training). Not to be confused with concept *ablation* fine-tuning (paper 18).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.models.token_metrics import MultiTokenLoss, metric_of
from lightning_peft.objectives.auxiliary_heads import AuxiliaryHeads, head_labels, load_heads
from lightning_peft.objectives.objective import HeadTerm, Objective, TrunkState
from lightning_peft.roles import final_norm
from lightning_peft.schedules import check_schedule, coefficient

if TYPE_CHECKING:
    from lightning_peft.models.fine_tuning_module import FineTuningModule, StepTerms
    from lightning_peft.objectives.objective import Batch


class ConceptAwareFineTuning(Objective):
    """The auxiliary heads' loss beside the network's own.

    Where page and code disagree: the published code pre-trains heads on the last block's input and then feeds them the
    final hidden state; here they read what they were trained on, unless `reproduce_repository`.

    Args:
        predicted_tokens: n, the network's own head included; 1 is plain fine-tuning.
        heads: Heads of this base: a file, a folder or a hub name (see `load_heads`).
        heads_init: "checkpoint" takes `heads`; "copy" starts them as copies of a block (untrained).
        head_arch: "transformer" (the network's own kind of block) or "linear" (Medusa blocks).
        head_layers: Layers per head.
        head_input: "penultimate" or "final": which hidden state the heads read.
        head_norm: Pass the heads' output through the network's final norm.
        separate_unembedding: Give each head its own output matrix.
        head_decay: alpha, the weight of head k is alpha^k.
        heads_coefficient: beta, what the heads' sum is multiplied by.
        heads_schedule: gamma: "rsine", "constant", "linear", "sine" or "sine_R" with R a fraction.
        finetune_heads: Train the heads too; otherwise they only pass gradient to the trunk.
        freeze_unembedding: Keep the output matrix (and an embedding tied to it) fixed.
        reproduce_repository: Read the final hidden state, without norm, as the published code does here.

    Raises:
        ValueError: An argument is out of range, heads are missing or belong to another base.
    """

    def __init__(
        self,
        predicted_tokens: int = 5,
        heads: str | None = None,
        heads_init: str = "checkpoint",
        head_arch: str = "transformer",
        head_layers: int = 1,
        head_input: str = "penultimate",
        head_norm: bool = True,
        separate_unembedding: bool = False,
        head_decay: float = 0.8,
        heads_coefficient: float = 0.01,
        heads_schedule: str = "rsine",
        finetune_heads: bool = False,
        freeze_unembedding: bool = False,
        reproduce_repository: bool = False,
    ) -> None:
        if predicted_tokens < 1:
            raise ValueError(f"predicted_tokens={predicted_tokens} must be at least 1 (the network's own next token).")
        if heads_init not in ("checkpoint", "copy"):
            raise ValueError(f"heads_init={heads_init!r} is not known: use 'checkpoint' or 'copy'.")
        if heads is None and heads_init == "checkpoint" and predicted_tokens > 1:
            raise ValueError(
                "concept-aware fine-tuning needs trained heads: give heads=PATH (made by AuxiliaryHeadPretrainingMixin "
                "and callbacks.AuxiliaryHeadCheckpoint), or heads_init='copy' to start from untrained "
                "copies of a block."
            )
        if head_decay < 0 or heads_coefficient < 0:
            raise ValueError(f"head_decay={head_decay} and heads_coefficient={heads_coefficient} must be at least 0.")
        check_schedule(heads_schedule, "heads_schedule")
        self.predicted_tokens, self.heads, self.heads_init = predicted_tokens, heads, heads_init
        self.head_arch, self.head_layers, self.separate_unembedding = head_arch, head_layers, separate_unembedding
        self.head_input = self.joint_input if reproduce_repository else head_input
        self.head_norm = head_norm and not reproduce_repository
        self.head_decay, self.heads_coefficient, self.heads_schedule = head_decay, heads_coefficient, heads_schedule
        self.finetune_heads, self.freeze_unembedding = finetune_heads, freeze_unembedding
        self.reproduce_repository = reproduce_repository
        self._said_without = False

    #: What the published code feeds the heads in this phase.
    joint_input = "final"

    def attach(self, module: FineTuningModule) -> None:
        network = module.model
        if self.freeze_unembedding:
            network.get_output_embeddings().requires_grad_(False)
        if self.predicted_tokens == 1:
            return
        module.auxiliary_heads = AuxiliaryHeads(
            network,
            self.predicted_tokens,
            self.head_arch,
            self.head_layers,
            self.head_input,
            self.head_norm,
            self.separate_unembedding,
        )
        if self.heads is not None:
            load_heads(module.auxiliary_heads, self.heads, any_input=self.reproduce_repository)
        module.auxiliary_heads.requires_grad_(self.finetune_heads)

    def on_fit_start(self, module: FineTuningModule) -> None:
        if self.heads_schedule != "constant" and module.schedule_steps == float("inf"):
            raise ValueError(
                f"heads_schedule={self.heads_schedule!r} needs the number of optimizer steps, which is not known: set "
                "Trainer(max_steps=...) or heads_schedule='constant'."
            )

    def term_name(self, k: int) -> str:
        return f"head_{k}"

    def _labels(self, batch: Batch) -> dict[str, Tensor]:
        documents = batch.get("document_ids")
        heads = range(1, self.predicted_tokens)
        return {self.term_name(k): head_labels(batch["labels"], k, documents) for k in heads}

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        counts = {name: int((labels != -100).sum()) for name, labels in self._labels(batch).items()}
        without = [name for name, count in counts.items() if not count]
        if without and not self._said_without:
            self._said_without = True
            rank_zero_warn(
                f"{', '.join(without)}: no label in a batch, so these heads learn nothing from it (said once). Answers "
                "shorter than predicted_tokens do that; a smaller predicted_tokens may suit the data."
            )
        return counts

    def gamma(self, module: FineTuningModule) -> float:
        """The schedule's value at this optimizer step."""
        if self.heads_schedule == "constant":
            return 1.0
        return coefficient(self.heads_schedule, module.schedule_step, int(module.schedule_steps))

    def head_coefficients(self, module: FineTuningModule) -> list[float]:
        """beta gamma alpha^k for k = 1 ... n-1; in evaluation, where only the means are read, ones."""
        if not module.training:
            return [1.0] * (self.predicted_tokens - 1)
        scale = self.heads_coefficient * self.gamma(module)
        return [scale * self.head_decay**k for k in range(1, self.predicted_tokens)]

    def needs_trunk(self, module: FineTuningModule) -> bool:
        return any(self.head_coefficients(module))

    def head_terms(self, module: FineTuningModule, batch: Batch, trunk: TrunkState) -> list[HeadTerm]:
        if not self.needs_trunk(module):
            return []
        labels = self._labels(batch)
        norm = final_norm(module.model) if self.head_norm else None
        outputs = module.auxiliary_heads(trunk, norm, list(labels.values()))
        terms = []
        for (name, targets), output, scale in zip(labels.items(), outputs, self.head_coefficients(module)):
            own = output if self.separate_unembedding else None
            terms.append(HeadTerm(name, output, targets, scale, nll=own))
        return terms

    def on_evaluated(self, module: FineTuningModule, stage: str, terms: StepTerms, dataloader_idx: int) -> None:
        names = ["loss" if "nll" not in terms.sums else "nll"]
        names += [self.term_name(k) for k in range(1, self.predicted_tokens)]
        key = f"{stage}_multi_token_loss" + (f"_{dataloader_idx}" if dataloader_idx else "")
        metric = metric_of(module, key, lambda: MultiTokenLoss(self.predicted_tokens, self.head_decay))
        metric.update(
            torch.stack([terms.sums[n].float() for n in names]),
            torch.tensor([float(terms.counts[n]) for n in names], device=module.device),
        )
        module.log(f"{stage}_multi_token_loss", metric, metric_attribute=f"metrics.{key}")


class AuxiliaryHeadPretraining(ConceptAwareFineTuning):
    """The heads alone: the same sum without L_0, beta 1, gamma constant, the base frozen.

    Args:
        predicted_tokens: n, the network's own head included.
        heads: Heads to go on from; by default copies of the second to last block.
        head_arch: "transformer" or "linear".
        head_layers: Layers per head.
        head_input: "penultimate" or "final".
        head_norm: Pass the heads' output through the network's final norm.
        separate_unembedding: Give each head its own output matrix.
        head_decay: alpha.
        reproduce_repository: No norm, as in the published code.
    """

    replaces_main = True
    joint_input = "penultimate"

    def __init__(
        self,
        predicted_tokens: int = 5,
        heads: str | None = None,
        head_arch: str = "transformer",
        head_layers: int = 1,
        head_input: str = "penultimate",
        head_norm: bool = True,
        separate_unembedding: bool = False,
        head_decay: float = 0.8,
        reproduce_repository: bool = False,
    ) -> None:
        if predicted_tokens < 2:
            raise ValueError(f"predicted_tokens={predicted_tokens}: there is no head to train below 2.")
        super().__init__(
            predicted_tokens,
            heads,
            "copy" if heads is None else "checkpoint",
            head_arch,
            head_layers,
            head_input,
            head_norm,
            separate_unembedding,
            head_decay,
            heads_coefficient=1.0,
            heads_schedule="constant",
            finetune_heads=True,
            reproduce_repository=reproduce_repository,
        )

    def attach(self, module: FineTuningModule) -> None:
        super().attach(module)
        module.model.requires_grad_(False)


class ConceptAwareFineTuningMixin:
    """Adds `ConceptAwareFineTuning` to a `CausalLM`: `class MyModel(ConceptAwareFineTuningMixin, CausalLM)`.

    Args:
        predicted_tokens: n, the network's own head included; 1 is plain fine-tuning.
        heads: Heads of this base: a file, a folder or a hub name.
        heads_init: "checkpoint" takes `heads`; "copy" starts them as copies of a block (untrained).
        head_arch: "transformer" (the network's own kind of block) or "linear" (Medusa blocks).
        head_layers: Layers per head.
        head_input: "penultimate" or "final": which hidden state the heads read.
        head_norm: Pass the heads' output through the network's final norm.
        separate_unembedding: Give each head its own output matrix.
        head_decay: alpha, the weight of head k is alpha^k.
        heads_coefficient: beta, what the heads' sum is multiplied by.
        heads_schedule: gamma: "rsine", "constant", "linear", "sine" or "sine_R" with R a fraction.
        finetune_heads: Train the heads too; otherwise they only pass gradient to the trunk.
        freeze_unembedding: Keep the output matrix (and an embedding tied to it) fixed.
        reproduce_repository: Read the final hidden state, without norm, as the published code does here.
    """

    def __init__(
        self,
        *args: Any,
        predicted_tokens: int = 5,
        heads: str | None = None,
        heads_init: str = "checkpoint",
        head_arch: str = "transformer",
        head_layers: int = 1,
        head_input: str = "penultimate",
        head_norm: bool = True,
        separate_unembedding: bool = False,
        head_decay: float = 0.8,
        heads_coefficient: float = 0.01,
        heads_schedule: str = "rsine",
        finetune_heads: bool = False,
        freeze_unembedding: bool = False,
        reproduce_repository: bool = False,
        **kwargs: Any,
    ) -> None:
        objective = ConceptAwareFineTuning(
            predicted_tokens,
            heads,
            heads_init,
            head_arch,
            head_layers,
            head_input,
            head_norm,
            separate_unembedding,
            head_decay,
            heads_coefficient,
            heads_schedule,
            finetune_heads,
            freeze_unembedding,
            reproduce_repository,
        )
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class AuxiliaryHeadPretrainingMixin:
    """Adds `AuxiliaryHeadPretraining` to a `CausalLM`: trains the heads of a base once, the base frozen.

    Args:
        predicted_tokens: n, the network's own head included.
        heads: Heads to go on from; by default copies of the second to last block.
        head_arch: "transformer" or "linear".
        head_layers: Layers per head.
        head_input: "penultimate" or "final".
        head_norm: Pass the heads' output through the network's final norm.
        separate_unembedding: Give each head its own output matrix.
        head_decay: alpha.
        reproduce_repository: No norm, as in the published code.
    """

    def __init__(
        self,
        *args: Any,
        predicted_tokens: int = 5,
        heads: str | None = None,
        head_arch: str = "transformer",
        head_layers: int = 1,
        head_input: str = "penultimate",
        head_norm: bool = True,
        separate_unembedding: bool = False,
        head_decay: float = 0.8,
        reproduce_repository: bool = False,
        **kwargs: Any,
    ) -> None:
        objective = AuxiliaryHeadPretraining(
            predicted_tokens,
            heads,
            head_arch,
            head_layers,
            head_input,
            head_norm,
            separate_unembedding,
            head_decay,
            reproduce_repository,
        )
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class ConceptAwareCausalLM(ConceptAwareFineTuningMixin, CausalLM):
    """`CausalLM` with concept-aware fine-tuning, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `ConceptAwareFineTuningMixin` and `CausalLM`.
    """


class AuxiliaryHeadPretrainingCausalLM(AuxiliaryHeadPretrainingMixin, CausalLM):
    """`CausalLM` that trains auxiliary heads only, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `AuxiliaryHeadPretrainingMixin` and `CausalLM`.
    """
