"""Which parameters an optimizer holds, changed in place while its schedule goes on.

A user's `configure_optimizers` sees every candidate as trainable, so that its filters and groups give each one its
home; then what does not train now is taken out. The full, ordered groups are remembered by name: a group is always
rebuilt in the same order, so optimizer state in a checkpoint fits whatever path led to the selection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from torch import nn
from torch.optim import Optimizer


class OptimizerGroups:
    """The parameter groups of a module's optimizers, kept to a changing selection.

    Args:
        pl_module: The module; its `configure_optimizers` is wrapped on the instance until `release`.
    """

    def __init__(self, pl_module: L.LightningModule) -> None:
        self._module = pl_module
        self._previous = pl_module.__dict__.get("configure_optimizers")
        self._original = pl_module.configure_optimizers
        self._candidates: set[str] = set()
        self._selected: Callable[[], set[str]] = set
        self._full: list[list[list[nn.Parameter]]] = []  # optimizer -> group -> all its parameters, in order
        pl_module.__dict__["configure_optimizers"] = self._configure

    def watch(self, candidates: set[str], selected: Callable[[], set[str]]) -> None:
        """Says whose membership follows the selection, and what is selected whenever it is asked."""
        self._candidates, self._selected = candidates, selected

    def _configure(self) -> Any:
        parameters = {n: p for n, p in self._module.named_parameters() if n in self._candidates}
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
        self.apply(optimizers)
        return configured

    def apply(self, optimizers: list[Any]) -> None:
        """Leaves in each optimizer what trains now; what leaves loses its state, what stays keeps it."""
        selected = self._selected()
        out = {id(p) for n, p in self._module.named_parameters() if n in self._candidates and n not in selected}
        for wrapped, groups in zip(optimizers, self._full):
            optimizer: Optimizer = getattr(wrapped, "_optimizer", wrapped)
            for group, everything in zip(optimizer.param_groups, groups):
                group["params"] = [p for p in everything if id(p) not in out]
            for parameter in [p for p in optimizer.state if id(p) in out]:
                del optimizer.state[parameter]

    def release(self) -> None:
        """Gives the module its own `configure_optimizers` back."""
        self._module.__dict__.pop("configure_optimizers", None)
        if self._previous is not None:
            self._module.__dict__["configure_optimizers"] = self._previous


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
