"""Which parameters an optimizer holds, changed in place while its schedule goes on.

A user's `configure_optimizers` sees every candidate as trainable, so that its filters and groups give each one its
home; then what does not train now is taken out. The full, ordered groups are remembered: a group is always rebuilt in
the same order, so optimizer state in a checkpoint fits whatever path led to the selection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _Selection(NamedTuple):
    candidates: set[str]
    selected: Callable[[], set[str]]
    after_step: Callable[[], None] | None


class OptimizerGroups:
    """The parameter groups of a module's optimizers, kept to the selections of those who `watch`; one for a module.

    Args:
        pl_module: The module; its `configure_optimizers` is wrapped on the instance until the last one's `release`.
    """

    def __init__(self, pl_module: L.LightningModule) -> None:
        self._module = pl_module
        self._previous = pl_module.__dict__.get("configure_optimizers")
        self._original = pl_module.configure_optimizers
        self._selections: dict[object, _Selection] = {}
        self._full: list[list[list[nn.Parameter]]] = []  # optimizer -> group -> all its parameters, in order
        self._born_with: list[dict[int, Any]] = []  # state made with the optimizer (Adagrad's), by parameter
        self._hooks: list[Any] = []
        pl_module.__dict__["configure_optimizers"] = self._configure

    @classmethod
    def of(cls, pl_module: L.LightningModule) -> OptimizerGroups:
        """The module's own, made on first use."""
        found = pl_module.__dict__.get("_optimizer_groups")
        if found is None:
            found = pl_module.__dict__["_optimizer_groups"] = cls(pl_module)
        return found

    def watch(
        self,
        owner: object,
        candidates: set[str],
        selected: Callable[[], set[str]],
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Lets a selection decide about some parameters.

        Args:
            owner: Who selects; `release` takes the same.
            candidates: Names of the parameters whose membership follows the selection.
            selected: What is selected, whenever it is asked.
            after_step: Called after every step of each optimizer.
        """
        self._selections[owner] = _Selection(candidates, selected, after_step)

    def release(self, owner: object) -> None:
        """Ends what `watch` began; after the last the module has its own `configure_optimizers` back."""
        self._selections.pop(owner, None)
        if self._selections:
            return
        for hook in self._hooks:
            hook.remove()
        self._module.__dict__.pop("_optimizer_groups", None)
        self._module.__dict__.pop("configure_optimizers", None)
        if self._previous is not None:
            self._module.__dict__["configure_optimizers"] = self._previous

    def _configure(self) -> Any:
        candidates: set[str] = set().union(*(s.candidates for s in self._selections.values()))
        parameters = {n: p for n, p in self._module.named_parameters() if n in candidates}
        now = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            configured = self._original()
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(now[name])
        optimizers = _optimizers(configured)
        self._full = [[list(group["params"]) for group in o.param_groups] for o in optimizers]
        self._born_with = [{id(p): copy.deepcopy(state) for p, state in o.state.items()} for o in optimizers]
        self._hooks += [o.register_step_post_hook(self._stepped) for o in optimizers]
        self.apply(optimizers)
        return configured

    def _stepped(self, *_: Any) -> None:
        for selection in self._selections.values():
            if selection.after_step is not None:
                selection.after_step()

    def apply(self, optimizers: list[Any]) -> None:
        """Leaves in each optimizer what trains now; what leaves loses its state, what stays keeps it.

        Under FSDP2 the module must be sharded (not gathered for a forward) when it is called.
        """
        unselected: set[str] = set().union(*(s.candidates - s.selected() for s in self._selections.values()))
        out = {id(p) for n, p in self._module.named_parameters() if n in unselected}
        for optimizer, groups, born_with in zip(map(_inner, optimizers), self._full, self._born_with):
            for group, everything in zip(optimizer.param_groups, groups):
                group["params"] = [p for p in everything if id(p) not in out]
            pattern = next(iter(optimizer.state.values()), None)
            for parameter in [p for p in optimizer.state if id(p) in out]:
                del optimizer.state[parameter]
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                if parameter.requires_grad and parameter not in optimizer.state:
                    _begin(optimizer, parameter, born_with, pattern)

    def reset(self, optimizers: list[Any], names: Iterable[str]) -> None:
        """Lets the optimizers forget what they know of these parameters, which they go on to hold."""
        parameters = dict(self._module.named_parameters())
        for optimizer, born_with in zip(map(_inner, optimizers), self._born_with):
            for parameter in [parameters[name] for name in names if parameters[name] in optimizer.state]:
                _begin(optimizer, parameter, born_with, optimizer.state.pop(parameter))


def _inner(optimizer: Any) -> Optimizer:
    """Torch's own optimizer inside Lightning's."""
    return getattr(optimizer, "_optimizer", optimizer)


#: State of SGD's and Adam's kinds, whose first step is the same from zeros as from nothing (SGD's: without dampening).
_ZEROS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


def _begin(optimizer: Optimizer, parameter: nn.Parameter, born_with: dict[int, Any], pattern: Any) -> None:
    """Gives a parameter the state of a new optimizer: none, but where that would be missed."""
    from torch.distributed.tensor import DTensor

    if id(parameter) in born_with:
        optimizer.state[parameter] = copy.deepcopy(born_with[id(parameter)])
    elif isinstance(parameter, DTensor) and pattern and pattern.keys() <= _ZEROS:
        # A distributed checkpoint needs state for every parameter, or makes some up by a step of its own.
        optimizer.state[parameter] = {key: _zeros(value, parameter) for key, value in pattern.items()}


def _zeros(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return None if value is None else 0
    return torch.zeros_like(parameter, dtype=value.dtype) if value.ndim else torch.zeros_like(value)


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in anything that Lightning accepts from `configure_optimizers`, in Lightning's order."""
    if configured is None:
        return []
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        first = configured[0] if configured else None
        if isinstance(first, (list, tuple)):  # ([optimizers], [schedulers])
            return list(first)
        return [optimizer for entry in configured for optimizer in _optimizers(entry)]
    raise TypeError(
        f"configure_optimizers gave a {type(configured).__name__}: see Lightning's documentation for its forms."
    )
