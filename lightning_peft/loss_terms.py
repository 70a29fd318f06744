"""Terms that a callback adds to the loss: one place for every technique and every kind of module.

A `FineTuningModule` keeps a list of objectives, and a callback's term is one more of them: it is divided by the
optimizer step's own count and scaled with everything else. On any other LightningModule `training_step` is wrapped on
the instance, and the term joins the loss of each micro-batch; Lightning then divides by the accumulation and DDP or
FSDP averages over the ranks, as they do for the module's own loss. Either way it is logged as `train_<name>`.

    term = LossTerm(["weight_norm"], lambda module: {"weight_norm": 0.1 * norm_of(module)})
    add_loss_terms(pl_module, term, "MyCallback")  # in setup
    remove_loss_terms(pl_module, term)  # in teardown and on_exception
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.models.fine_tuning_module import FineTuningModule
from lightning_peft.objectives.objective import Batch, Objective

#: What an objective may say beside further terms; only a `FineTuningModule` asks for it.
_STEP_HOOKS = ("transform_batch", "before_forward", "loss_weights", "head_terms")


class LossTerm(Objective):
    """Scalars that are added to the loss as they are, such as penalties on weights: no count of units divides them.

    Over the micro-batches and ranks of an optimizer step they are averaged, so a penalty counts once a step.

    Args:
        names: The terms' names, unique in a run.
        values: Gives the scalars by name, coefficients included; called with the module after its forward, in training
            only. A name may be left out while the term does not act.
    """

    def __init__(self, names: Sequence[str], values: Callable[[Any], dict[str, Tensor]]) -> None:
        self.names, self.values = tuple(names), values

    def counts(self, module: Any, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(self.names, 1)

    def auxiliary_losses(self, module: Any, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        return self.values(module) if torch.is_grad_enabled() else {}


def add_loss_terms(pl_module: L.LightningModule, objective: Objective, owner: str) -> None:
    """Adds an objective's terms to the loss of any LightningModule, once: a second call changes nothing.

    Call it from a callback's `setup`, for "fit" only. On a module that is no `FineTuningModule` the objective's
    `auxiliary_losses` is given what `training_step` returned.

    Args:
        pl_module: The module.
        objective: Whose `counts` and `auxiliary_losses` say the terms.
        owner: The callback's name, for messages.

    Raises:
        ValueError: The module uses manual optimisation, or it is no `FineTuningModule` and the objective does more to
            the step than adding terms.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{owner} adds terms to the loss, and {type(pl_module).__name__} uses manual optimization "
            "(automatic_optimization=False), where only its own training_step sees the loss: use automatic "
            f"optimization, or leave {owner} out."
        )
    if isinstance(pl_module, FineTuningModule):
        if not _is_in(objective, pl_module.objectives):
            pl_module.add_objective(objective)
        return
    for hook in _STEP_HOOKS:
        if getattr(type(objective), hook) is not getattr(Objective, hook):
            raise ValueError(
                f"{owner} changes the step itself ({hook}), which {type(pl_module).__name__} does not offer: derive "
                "the module from lightning_peft.models.FineTuningModule."
            )
    wrapped = pl_module.__dict__.get("training_step")
    if not hasattr(wrapped, "loss_terms"):
        wrapped = _wrapped(pl_module)
        pl_module.__dict__["training_step"] = wrapped
    if not _is_in(objective, wrapped.loss_terms):  # type: ignore[union-attr]
        objective.attach(pl_module)  # type: ignore[arg-type]
        wrapped.loss_terms.append(objective)  # type: ignore[union-attr]


def remove_loss_terms(pl_module: L.LightningModule, objective: Objective) -> None:
    """Takes an objective's terms out again, in any order; what is not there is left alone."""
    if isinstance(pl_module, FineTuningModule):
        pl_module.objectives[:] = [other for other in pl_module.objectives if other is not objective]
        return
    wrapped: Any = pl_module.__dict__.get("training_step")
    layer = wrapped
    while layer is not None:  # somebody may have wrapped ours since: then it stays in theirs and adds nothing
        if hasattr(layer, "loss_terms"):
            layer.loss_terms[:] = [other for other in layer.loss_terms if other is not objective]
        layer = getattr(layer, "__wrapped__", None)
    if hasattr(wrapped, "loss_terms") and not wrapped.loss_terms:
        if wrapped.previous is None:
            del pl_module.__dict__["training_step"]
        else:
            pl_module.__dict__["training_step"] = wrapped.previous


def _is_in(objective: Objective, objectives: Sequence[Objective]) -> bool:
    return any(other is objective for other in objectives)


def _wrapped(pl_module: L.LightningModule) -> Any:
    # All state is on the function: copying the module (weight averaging does) copies neither callbacks nor terms.
    original: Any = pl_module.training_step

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        batch = args[0] if args else next(iter(kwargs.values()), None)
        return _with_terms(pl_module, made.loss_terms, batch, outputs)

    made: Any = training_step
    made.loss_terms = []
    made.previous = pl_module.__dict__.get("training_step")
    return made


def _with_terms(pl_module: Any, objectives: list[Objective], batch: Any, outputs: Any) -> Any:
    """What `training_step` returned, with sum_j numerator_j / count_j added to its loss."""
    if outputs is None:  # Lightning's sign for skipping the step
        return None
    total: Tensor | None = None
    names: set[str] = set()
    for objective in objectives:
        terms = objective.auxiliary_losses(pl_module, batch, outputs)
        counts = objective.counts(pl_module, batch) if terms else {}
        for name, numerator in terms.items():
            if name in names:
                raise ValueError(f"two callbacks add a term named {name!r} to the loss: give one of them another name.")
            names.add(name)
            term = numerator / max(counts[name], 1)
            pl_module.log(f"train_{name}", term.detach(), batch_size=max(counts[name], 1))
            total = term if total is None else total + term
    if total is None:
        return outputs
    if isinstance(outputs, Mapping):
        return {**outputs, "loss": outputs["loss"] + total}
    return outputs + total
