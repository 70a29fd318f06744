"""Causal language models: the loss is made inside the output head's own forward, logits are never held."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.kernels import Rows, weighted_linear_cross_entropy
from lightning_peft.models.fine_tuning_module import FineTuningModule, StepTerms
from lightning_peft.models.generation import continuations
from lightning_peft.models.output_head import (
    Forward,
    LogitTransform,
    head_nll,
    head_of,
    matrix_of,
    replaced_forward,
)
from lightning_peft.models.token_metrics import Perplexity, log_term
from lightning_peft.objectives.objective import HeadTerm, Objective, TrunkState
from lightning_peft.roles import transformer_blocks

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch

IGNORED = -100


class CausalLM(FineTuningModule):
    """Any causal language model of transformers, fine-tuned on the tokens whose label is not -100.

    Batches are dictionaries with `input_ids`, `labels` (both [batch, time], labels not shifted) and `attention_mask`;
    packed rows bring `position_ids` and `document_ids` (-1 is padding) instead of a mask, and documents do not see each
    other. An optional `weight` [batch] multiplies a row's tokens.

    Logged: `train_loss`, `val_loss`, `val_perplexity`, `val_accuracy`, and every further term by its name; where tokens
    are weighted also `nll`, the loss without weights, and `weight`, the mean of the weights.

    Args:
        model: Hub name, folder, `.gguf` file, or a network that is already built.
        generation: Arguments of `generate` for `predict`, such as `{"max_new_tokens": 64, "do_sample": false}`.
        **kwargs: The arguments of `FineTuningModule`.
    """

    auto_class = "AutoModelForCausalLM"

    def __init__(self, model: str | nn.Module, generation: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.generation = {"max_new_tokens": 64, "do_sample": False, **(generation or {})}
        self._transform_checked = False

    # -- the network ----------------------------------------------------------------------------------------------

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the network is called with. Override for a network that takes more than text."""
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if "document_ids" in batch:
            from lightning_peft.attention_mask import packed_attention_mask

            dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
            inputs["attention_mask"] = packed_attention_mask(batch["document_ids"], dtype)
            inputs["position_ids"] = batch["position_ids"]
        elif batch.get("attention_mask") is not None:
            inputs["attention_mask"] = batch["attention_mask"]
        return inputs

    @cached_property
    def logit_transform(self) -> LogitTransform:
        """What the network does to its head's output."""
        return LogitTransform.of(self.model.config)

    def hidden_states(self, batch: Batch, network: Any | None = None) -> Tensor:
        """What the output head reads, [batch, time, width]: the network run whole, with its head only looking.

        Args:
            batch: The batch.
            network: Another network than the module's own, such as a frozen reference.
        """
        seen: list[Tensor] = []
        network = self.model if network is None else network

        def look(hidden: Tensor) -> Tensor:
            seen.append(hidden[:, -batch["input_ids"].shape[1] :])
            return hidden.new_ones((*hidden.shape[:-1], 1))

        with replaced_forward(head_of(network), look):
            network(**self.model_inputs(batch))
        return seen[0]

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flat positions [n] of the labelled tokens and their nll [n], by the network alone: no objective takes part.

        For passes beside the step, under `no_grad` or not. A label at a row's first token is not predicted.
        """
        made: list[tuple[Tensor, Tensor]] = []
        head = head_of(self.model)
        labels = batch["labels"]
        targets = (labels[:, 1:] != IGNORED).flatten().nonzero().squeeze(1)
        index = targets + targets // max(labels.shape[1] - 1, 1) + 1  # in the flattened labels, first column included

        def read(hidden: Tensor) -> Tensor:
            rows = _last(hidden, labels.shape[1])[index - 1]
            nll = head_nll(head, original, rows, labels.flatten()[index], self.logit_transform).nll
            made.append((index, nll))
            return hidden.new_ones((*hidden.shape[:-1], 1))

        with replaced_forward(head, read) as original:
            self.model(**self.model_inputs(batch))
        return made[0]

    # -- the step -------------------------------------------------------------------------------------------------

    def count_units(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def terms(self, batch: Batch, counts: dict[str, Tensor]) -> StepTerms:
        batch = self.before_forward(batch)
        made: list[StepTerms] = []
        head = head_of(self.model)
        seen: dict[str, Any] = {}

        def fused(hidden: Tensor) -> Tensor:
            further: list[HeadTerm] = []
            if seen:
                further = self.head_terms(batch, TrunkState(final=hidden, logits=original, **seen))
            made.append(self._terms_of_rows(head, original, hidden, batch, counts, further))
            return hidden.new_ones((*hidden.shape[:-1], 1))  # what the network then scales or caps: a probe of it

        hook = self._watch_last_block(seen) if any(o.needs_trunk(self) for o in self.objectives) else None
        try:
            # Inside the head's own forward its weight is whole under FSDP2, and prompt learning acts (FINDINGS, 7).
            with replaced_forward(head, fused) as original:
                outputs = self.model(**self.model_inputs(batch))
        finally:
            if hook is not None:
                hook.remove()
        if not self._transform_checked:
            self.logit_transform.check(outputs.logits.detach())
            self._transform_checked = True
        terms = made[0]
        terms.outputs = outputs
        auxiliary = self.auxiliary_losses(batch, outputs)
        own_counts = self.counts(batch) if auxiliary else {}
        for name, numerator in auxiliary.items():
            terms.loss = terms.loss + numerator / counts[name].clamp(min=1)
            terms.sums[name], terms.counts[name] = numerator.detach(), own_counts[name]
        return terms

    def _watch_last_block(self, seen: dict[str, Any]) -> Any:
        _, block = transformer_blocks(self.model)[-1]

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values", "use_cache")}
            hidden = args[0] if args else kwargs.pop("hidden_states")
            seen.update(penultimate=hidden, block_args=args[1:], block_kwargs=kwargs)

        return block.register_forward_pre_hook(keep, with_kwargs=True)

    def _terms_of_rows(
        self,
        head: nn.Module,
        forward: Forward,
        hidden: Tensor,
        batch: Batch,
        counts: dict[str, Tensor],
        further: list[HeadTerm],
    ) -> StepTerms:
        """All terms that the output matrix reads, in one call of the kernel over their labelled rows."""
        labels = batch["labels"]
        shifted = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
        main = HeadTerm("loss", hidden, shifted, 1.0)
        replaced = self.training and any(objective.replaces_main for objective in self.objectives)
        shared = ([] if replaced else [main]) + [term for term in further if term.nll is None]
        chosen = [(term.labels != IGNORED).flatten().nonzero().squeeze(1) for term in shared]
        rows = torch.cat([hidden[:0, 0]] + [_last(t.hidden, labels.shape[1])[c] for t, c in zip(shared, chosen)])
        targets = torch.cat([labels[0, :0]] + [t.labels.flatten()[c] for t, c in zip(shared, chosen)])
        sizes = [len(c) for c in chosen]
        own_rows = 0 if replaced else sizes[0]
        # Coefficient over the step's count, row by row: what a term is multiplied by, known before the kernel.
        factors = {t.name: t.coefficient / counts[t.name].clamp(min=1) for t in (main, *further)}
        scale = torch.cat([factors["loss"][None][:0]] + [factors[t.name].expand(n) for t, n in zip(shared, sizes)])
        # A main row's target stands one position on. Further terms take no weight: theirs only has to be in range.
        index = torch.cat([c + 1 if t is main else c for t, c in zip(shared, chosen)] or [targets])

        def weigh(units: Rows) -> Tensor:
            if not self.rowwise:  # called once, for all rows: those of further terms are not the weights' to see
                own = Rows(*(None if column is None else column[:own_rows] for column in units))  # type: ignore[arg-type]
                weights = self.loss_weights(batch, own._replace(index=index[:own_rows]))
                ones = torch.ones_like(units.nll)
                return ones if weights is None else torch.cat([weights.to(ones), ones[own_rows:]])
            weights = self.loss_weights(batch, units._replace(index=index[units.index]))
            ones = torch.ones_like(units.nll)
            return ones if weights is None else torch.where(units.index < own_rows, weights.to(units.nll), ones)

        # Also where no row is labelled: a weight that needs other ranks' rows asks for them on every rank.
        rule = weigh if not replaced and self._has_weights(batch) else None
        loss, units, weights = self._reduce(head, forward, rows, targets, scale, rule)
        sums, sizes_of, per_row = {}, {}, {}
        for term, places, nll, weight in zip(shared, chosen, units.nll.split(sizes), weights.split(sizes)):
            sums[term.name], sizes_of[term.name] = (weight * nll).sum(), len(nll)
            per_row[term.name] = (places, nll)
        for term in further:
            if term.nll is not None:
                loss = loss + factors[term.name] * term.nll.sum()
                sums[term.name], sizes_of[term.name] = term.nll.detach().sum(), len(term.nll)
        if rule is not None:
            sums["nll"], sums["weight"] = units.nll[:own_rows].sum(), weights[:own_rows].sum()
            sizes_of["nll"] = sizes_of["weight"] = own_rows
        own = Rows(*(None if column is None else column[:own_rows] for column in units))  # type: ignore[arg-type]
        given = None if rule is None else weights[:own_rows]
        return StepTerms(loss, sums, sizes_of, own._replace(index=index[:own_rows]), given, per_row)

    def _reduce(
        self, head: nn.Module, forward: Forward, rows: Tensor, targets: Tensor, scale: Tensor, rule: Any
    ) -> tuple[Tensor, Rows, Tensor]:
        """sum_i scale_i w_i nll_i with the cheapest exact path; the rows' statistics and weights, detached."""
        matrix = matrix_of(head)
        index = torch.arange(len(targets), device=targets.device)
        transform = self.logit_transform
        statistics = self._statistics()
        trained = matrix is not None and any(p is not None and p.requires_grad for p in matrix)
        if trained and torch.is_grad_enabled() and self.rowwise:
            weight, bias = matrix  # type: ignore[misc]
            loss, made = weighted_linear_cross_entropy(
                rows,
                weight,
                targets,
                rule,
                bias,
                scale=scale,
                softcap=transform.softcap,
                logit_scale=transform.scale,
                statistics=statistics,
            )
            return loss, Rows(made.nll, made.entropy, made.is_argmax, targets, index), made.weights
        out = head_nll(head, forward, rows, targets, transform, statistics)
        entropy = None if out.entropy is None else out.entropy.detach()
        units = Rows(out.nll.detach(), entropy, out.is_argmax, targets, index)
        weights = torch.ones_like(units.nll) if rule is None else rule(units)
        return (scale * weights * out.nll).sum(), units, weights.detach()

    def _statistics(self) -> frozenset[str]:
        """What the kernel has to give besides nll: it costs time, so only what somebody reads."""
        asked = {"is_argmax"} if not self.training else set()
        return frozenset(asked.union(*(objective.needs for objective in self.objectives)))

    def _has_weights(self, batch: Batch) -> bool:
        overridden = type(self).loss_weights is not FineTuningModule.loss_weights
        own = any(type(objective).loss_weights is not Objective.loss_weights for objective in self.objectives)
        return "weight" in batch or overridden or own

    def log_units(self, stage: str, units: Rows, dataloader_idx: int) -> None:
        super().log_units(stage, units, dataloader_idx)
        log_term(self, f"{stage}_perplexity", units.nll.sum(), len(units.labels), dataloader_idx, Perplexity)

    # -- text -----------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """The continuation of each row's prompt (what stands before its first labelled token), as text."""
        if self.tokenizer is None:
            raise ValueError("predict gives text and needs a tokenizer: pass CausalLM(tokenizer=...).")
        prompts = []
        for row, ids in enumerate(batch["input_ids"]):
            kept = batch["attention_mask"][row].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
            if "labels" in batch and (batch["labels"][row] != IGNORED).any():
                kept = kept & ((batch["labels"][row] != IGNORED).cumsum(0) == 0)
            prompts.append(ids[kept].tolist())
        return continuations(self, prompts, self.generation)


def _last(hidden: Tensor, time: int) -> Tensor:
    """The last `time` positions as rows: prompt learning puts virtual tokens in front."""
    return hidden[:, -time:].flatten(0, 1)
