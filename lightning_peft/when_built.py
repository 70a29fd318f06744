"""Acting on a network as soon as it exists: in `setup`, or inside `configure_model` before it is sharded.

Adapters and selections have to be there before the strategy wraps the network and before optimizers are made. Modules
that build their network in `configure_model` have none yet when callbacks are set up (FINDINGS, 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

Action = Callable[[L.LightningModule], Any]


def has_parameters(module: nn.Module) -> bool:
    """Whether anything is there to act on."""
    return any(True for _ in module.parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is a DTensor (FSDP2, tensor parallel)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def when_built(
    pl_module: L.LightningModule, action: Action, exists: Callable[[nn.Module], bool] = has_parameters
) -> None:
    """Runs `action(pl_module)` now if the network exists, else once `configure_model` has built it.

    In `configure_model` actions run, in the order they were asked for, at the first read of `self.device_mesh` at which
    the network exists (that is: before `fully_shard`), or else when `configure_model` returns. A second call with the
    same action before it ran changes nothing.

    Args:
        pl_module: The module.
        action: What to do; it must leave a module that it has acted on before as it is.
        exists: Whether the module's network is there.

    Raises:
        RuntimeError: `configure_model` returned a network that was sharded before `action` could run.
    """
    if exists(pl_module) or not is_overridden("configure_model", pl_module):
        action(pl_module)
        return
    waiting: list[tuple[Action, Callable[[nn.Module], bool]]] | None = pl_module.__dict__.get("_when_built")
    if waiting is None:
        waiting = pl_module.__dict__["_when_built"] = []
        pl_module.__dict__["configure_model"] = _wrapped(pl_module, waiting)
    if action not in [other for other, _ in waiting]:
        waiting.append((action, exists))


def forget(pl_module: L.LightningModule) -> None:
    """Takes back what `when_built` still waits for; a callback's `teardown` calls it."""
    if pl_module.__dict__.pop("_when_built", None) is not None:
        pl_module.__dict__.pop("configure_model", None)


def _wrapped(pl_module: L.LightningModule, waiting: list[Any]) -> Callable[[], None]:
    previous = pl_module.__dict__.get("configure_model")  # someone else's, on the instance
    original = pl_module.configure_model

    def run(at_least_parameters: bool = False) -> None:
        while waiting and (waiting[0][1](pl_module) or (at_least_parameters and has_parameters(pl_module))):
            waiting.pop(0)[0](pl_module)

    @functools.wraps(original)
    def configure_model() -> None:
        own_class = type(pl_module)

        # The mesh is what a module shards by, so whoever asks for it is about to shard.
        def device_mesh(self: Any) -> Any:
            run()
            return own_class.device_mesh.fget(self)  # type: ignore[attr-defined]

        watching = type(own_class.__name__, (own_class,), {"device_mesh": property(device_mesh)})
        watching.__qualname__, watching.__module__ = own_class.__qualname__, own_class.__module__
        pl_module.__class__ = watching
        try:
            original()
        finally:
            pl_module.__class__ = own_class
        if waiting and is_sharded(pl_module):
            raise RuntimeError(
                f"{own_class.__name__}.configure_model shards its network before a callback could act on it: build "
                "the network in __init__, or read `self.device_mesh` only once the network is built (it is there that "
                "callbacks act), or call the callback's `attach(self)` between the two."
            )
        run(at_least_parameters=True)
        pl_module.__dict__.pop("_when_built", None)
        pl_module.__dict__.pop("configure_model", None)
        if previous is not None:
            pl_module.__dict__["configure_model"] = previous

    return configure_model
