"""Neighbourhood self-constrained fine-tuning: cross-entropy, kept near the network that it started from.

(NSC-SFT, AnalogSeeker, arXiv 2508.10409, equations 7 and 8; also the anchor for any other objective.)

    L = CE(theta) + lambda * (1/M) sum_t KL(p_theta(.|x_<t) || p_0(.|x_<t))

over the supervised positions, p_0 the network before its first training step, in evaluation mode. The authors' training
code is not published; direction and lambda 0.1 are those of a public reproduction. KL(p_0 || p_theta) is an option.

p_0 comes from one of three places:

- "frozen_copy": a second copy of the network, made when the module is built, outside of its parameters and checkpoints;
- "adapter_disabled": the network itself with its adapters switched off, so one copy only;
- "cached": the k most likely tokens of p_0 at each position, from `datamodules.ReferenceData`. The rest of the
  vocabulary counts as one token, which makes the term a lower bound of the KL (exact where one token is the rest).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_peft.delta import digest
from lightning_peft.kernels import linear_kl
from lightning_peft.models.causal_lm import IGNORED, CausalLM
from lightning_peft.models.output_head import Forward, LogitTransform, head_of, matrix_of
from lightning_peft.network_modes import adapters_disabled, evaluation_mode
from lightning_peft.objectives.objective import HeadTerm, Objective, TrunkState

if TYPE_CHECKING:
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

REFERENCES = ("frozen_copy", "adapter_disabled", "cached")
DIRECTIONS = ("reverse", "forward")
TERM = "reference_kl"


def trained_beside_adapters(network: Any) -> list[str]:
    """Names of trainable parameters that are no adapter's; switching the adapters off would not undo them."""
    from peft import PeftModel

    from lightning_peft.adapters.injection import tuner_of

    tuner: Any = network.base_model if isinstance(network, PeftModel) else tuner_of(network)
    own = [tuner.prefix] if hasattr(tuner, "prefix") else []
    marks = [*own, "modules_to_save.", "trainable_tokens_", "prompt_encoder."]
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    return [name for name in trained if not any(mark in name for mark in marks)]


def kl_through_heads(
    forward: Forward,
    hidden: Tensor,
    forward_ref: Forward,
    hidden_ref: Tensor,
    transform: LogitTransform,
    direction: str,
    chunk_rows: int = 1024,
) -> Tensor:
    """KL of each row [n] through the heads' own forwards, for heads that are more than a matrix.

    Args:
        forward: The student's head.
        hidden: Its rows [n, width].
        forward_ref: The reference's head.
        hidden_ref: Its rows.
        transform: What the networks do to their heads' outputs.
        direction: "reverse" is KL(student || reference), "forward" the other.
        chunk_rows: Rows of logits held at once.
    """

    def chunk(rows: Tensor, rows_ref: Tensor) -> Tensor:
        log_p = transform(forward(rows)).float().log_softmax(-1)
        with torch.no_grad():
            log_q = transform(forward_ref(rows_ref)).float().log_softmax(-1)
        if direction == "forward":
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    parts = zip(hidden.split(chunk_rows), hidden_ref.split(chunk_rows))
    return torch.cat([checkpoint(chunk, rows, rows_ref, use_reentrant=False) for rows, rows_ref in parts])


def kl_to_top_k(
    forward: Forward,
    hidden: Tensor,
    ids: Tensor,
    log_q: Tensor,
    transform: LogitTransform,
    direction: str,
    chunk_rows: int = 1024,
) -> Tensor:
    """KL of each row [n] against a reference of which the k most likely tokens are known, the rest as one token.

    Args:
        forward: The student's head.
        hidden: Its rows [n, width].
        ids: The reference's most likely tokens [n, k].
        log_q: Their log probabilities and that of all other tokens together, [n, k + 1].
        transform: What the network does to its head's output.
        direction: "reverse" is KL(student || reference), "forward" the other.
        chunk_rows: Rows of logits held at once.
    """

    def chunk(rows: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        log_p = with_rest(transform(forward(rows)).float().log_softmax(-1), ids)
        if direction == "forward":
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    parts = zip(*(x.split(chunk_rows) for x in (hidden, ids, log_q)))
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """log p of the tokens `ids` [n, k] and of all others together, [n, k + 1], from log p of all [n, vocabulary]."""
    others = log_p.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), others], dim=1)


class SelfConstrained(Objective):
    """Adds lambda * KL to the network before training, logged as `reference_kl` (without lambda).

    Args:
        nsc_weight: lambda.
        nsc_direction: "reverse" is KL(network || reference), "forward" is KL(reference || network).
        nsc_reference: "frozen_copy", "adapter_disabled" or "cached".

    Raises:
        ValueError: An argument is out of range; adapters are to be switched off where more than they trains; the batch
            has no cached reference; or a checkpoint began from another network.
    """

    def __init__(
        self, nsc_weight: float = 0.1, nsc_direction: str = "reverse", nsc_reference: str = "frozen_copy"
    ) -> None:
        if not nsc_weight >= 0:
            raise ValueError(f"nsc_weight={nsc_weight} must be at least 0.")
        if nsc_direction not in DIRECTIONS:
            raise ValueError(f"nsc_direction={nsc_direction!r} is not known: use one of {DIRECTIONS}.")
        if nsc_reference not in REFERENCES:
            raise ValueError(f"nsc_reference={nsc_reference!r} is not known: use one of {REFERENCES}.")
        self.nsc_weight, self.nsc_direction, self.nsc_reference = nsc_weight, nsc_direction, nsc_reference
        self._copy: Any = None
        self._digest: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfConstrained:
        made = memo[id(self)] = copy.copy(self)  # a module's average, say, shares the reference: nothing writes to it
        return made

    # -- the reference --------------------------------------------------------------------------------------------

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, CausalLM):
            raise ValueError(f"SelfConstrained reads an output head token by token: {type(module).__name__} has none.")
        if self.nsc_weight and self.nsc_reference == "frozen_copy":
            # Here and nowhere later: `setup` and `on_fit_start` of a resumed run see weights that have been trained.
            self._copy = copy.deepcopy(module.model).requires_grad_(False).eval()

    def on_fit_start(self, module: Any) -> None:
        if not self.nsc_weight or self.nsc_reference != "adapter_disabled":
            return
        from lightning_peft.adapters.injection import changed_base

        network = module.model
        if not getattr(network, "peft_config", None):
            raise ValueError(
                "nsc_reference='adapter_disabled' and the network has no adapter: add callbacks.PEFT, or use "
                "nsc_reference='frozen_copy'."
            )
        beside = trained_beside_adapters(network) + sorted(changed_base(network))
        if beside:
            raise ValueError(
                "nsc_reference='adapter_disabled' gives the starting network only if nothing but adapters differs from "
                f"it, and {len(beside)} other weights train or were changed by the adapter's initialisation (first: "
                f"{beside[0]}): freeze them, or use nsc_reference='frozen_copy'."
            )

    def _reference(self, module: Any) -> Any:
        """The frozen copy, where the module is and in its dtype."""
        own, copied = (next(p for p in n.parameters() if p.is_floating_point()) for n in (module.model, self._copy))
        if copied.device != own.device or copied.dtype != own.dtype:
            self._take_digest()  # of what was copied, before it is cast
            self._copy.to(own.device, own.dtype)
        return self._copy

    def _take_digest(self) -> str | None:
        if self._digest is None and self._copy is not None:
            whole = "".join(f"{name}:{digest(p)}" for name, p in sorted(self._copy.named_parameters()))
            self._digest = xxhash.xxh3_128(whole.encode()).hexdigest()
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        """A digest of the reference: its weights are not in checkpoints."""
        return {"reference": self._take_digest()} if self._copy is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._copy is not None and state.get("reference") not in (None, self._take_digest()):
            raise ValueError(
                "the checkpoint's run was held near another network than the one given now: build the module on the "
                "weights that the run started from (they are not in the checkpoint)."
            )

    # -- the step -------------------------------------------------------------------------------------------------

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        return {TERM: int((batch["labels"][:, 1:] != IGNORED).sum())} if self.nsc_weight else {}

    def before_forward(self, module: Any, batch: Batch) -> Batch:
        """Adds `reference_hidden`, what the reference's head reads at supervised positions, [n, width]."""
        if not self.nsc_weight:
            return batch
        if self.nsc_reference == "cached":
            self._check_cached(batch)
            return batch
        network = self._reference(module) if self.nsc_reference == "frozen_copy" else module.model
        off = adapters_disabled(network) if self.nsc_reference == "adapter_disabled" else nullcontext()
        with torch.no_grad(), evaluation_mode(network), off:
            hidden = module.hidden_states(batch, network)
        return {**batch, "reference_hidden": hidden.flatten(0, 1)[self._places(batch)]}

    def _check_cached(self, batch: Batch) -> None:
        if "reference_ids" not in batch:
            raise ValueError(
                "nsc_reference='cached' and the batch has no reference_ids: feed the module by "
                "datamodules.ReferenceData, or use another nsc_reference."
            )
        if batch["reference_ids"].shape[:2] != batch["labels"].shape:
            raise ValueError(
                f"reference_ids has shape {tuple(batch['reference_ids'].shape)} and labels "
                f"{tuple(batch['labels'].shape)}: their first two axes must be equal."
            )

    def _places(self, batch: Batch) -> Tensor:
        return (self._targets(batch) != IGNORED).flatten().nonzero().squeeze(1)

    def needs_trunk(self, module: FineTuningModule) -> bool:
        return self.nsc_weight > 0

    def head_terms(self, module: Any, batch: Batch, trunk: TrunkState) -> list[HeadTerm]:
        if not self.nsc_weight:
            return []
        places, time = self._places(batch), batch["labels"].shape[1]
        rows = trunk.final[:, -time:].flatten(0, 1)[places]  # prompt learning puts virtual tokens in front
        assert trunk.logits is not None
        if self.nsc_reference == "cached":
            # Columns stand with the token; it is predicted one position before.
            ids, log_q = (batch[f"reference_{name}"].flatten(0, 1)[places + 1] for name in ("ids", "log_probs"))
            kl = kl_to_top_k(trunk.logits, rows, ids, log_q, module.logit_transform, self.nsc_direction)
        else:
            kl = self._kl(module, trunk.logits, rows, batch["reference_hidden"])
        return [HeadTerm(TERM, trunk.final, self._targets(batch), self.nsc_weight, nll=kl)]

    def _kl(self, module: Any, forward: Forward, rows: Tensor, rows_ref: Tensor) -> Tensor:
        head, transform = head_of(module.model), module.logit_transform
        matrix = matrix_of(head)
        off = self.nsc_reference == "adapter_disabled"
        head_ref = head if off else head_of(self._copy)
        with adapters_disabled(module.model) if off else nullcontext():
            matrix_ref = matrix_of(head_ref)
        if matrix is not None and matrix_ref is not None:
            (weight, bias), (weight_ref, bias_ref) = matrix, matrix_ref
            return linear_kl(
                rows,
                weight,
                rows_ref,
                weight_ref,
                bias,
                bias_ref,
                direction=self.nsc_direction,
                softcap=transform.softcap,
                logit_scale=transform.scale,
            )

        def forward_ref(hidden: Tensor) -> Tensor:
            if not off:
                return head_ref(hidden)
            with adapters_disabled(module.model):
                return forward(hidden)

        return kl_through_heads(forward, rows, forward_ref, rows_ref, transform, self.nsc_direction)


class SelfConstrainedMixin:
    """Adds `SelfConstrained` to a `CausalLM`: `class MyModel(SelfConstrainedMixin, CausalLM)`.

    Args:
        nsc_weight: lambda, what the KL is multiplied by.
        nsc_direction: "reverse" is KL(network || reference), "forward" is KL(reference || network).
        nsc_reference: "frozen_copy" (a second network), "adapter_disabled" (adapters switched off; needs
            callbacks.PEFT) or "cached" (the most likely tokens, from datamodules.ReferenceData).
    """

    def __init__(
        self,
        *args: Any,
        nsc_weight: float = 0.1,
        nsc_direction: str = "reverse",
        nsc_reference: str = "frozen_copy",
        **kwargs: Any,
    ) -> None:
        objective = SelfConstrained(nsc_weight, nsc_direction, nsc_reference)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class SelfConstrainedCausalLM(SelfConstrainedMixin, CausalLM):
    """`CausalLM` with neighbourhood self-constrained fine-tuning, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `SelfConstrainedMixin` and `CausalLM`.
    """
