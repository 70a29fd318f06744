"""Copies of weights and optimizer state in host memory, also of sharded ones: each process keeps its own shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerState = dict[str, dict[str, Any]]  # parameter's name -> what an optimizer knows of it


def local(tensor: Tensor) -> Tensor:
    """The tensor, or of a sharded one (a DTensor) this process's part; the same storage."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def to_host(tensor: Tensor) -> Tensor:
    """A copy of this process's part in host memory."""
    return local(tensor.detach()).to("cpu", copy=True)


@torch.no_grad()
def gathered(host: Tensor, like: Tensor) -> Tensor:
    """The whole tensor on the host of rank 0 (elsewhere `host`), from what `to_host` kept on each process.

    A collective call for sharded tensors.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor) or host.shape != like.to_local().shape:
        return host
    part = host.to(like.to_local().device)
    sharded = _sharded(part, like)
    assert isinstance(sharded, DTensor)
    whole = sharded.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else host


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What `to_host` would have kept here, from the whole tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    device = like.to_local().device
    placed = distribute_tensor(whole.to(device), like.device_mesh, like.placements, src_data_rank=None)
    return to_host(placed)


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """`values`, computed from this process's part of `like`, added up over the processes that hold the other parts."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(values, group=like.device_mesh.get_group(dimension))
    return values


def reshard(module: nn.Module) -> None:
    """Gives back what FSDP2 still holds gathered after a forward without a backward: parameters are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def take_optimizer_state(optimizers: Sequence[Optimizer], names: dict[int, str]) -> list[OptimizerState]:
    """What the optimizers know of the parameters in `names` (id -> name), on the host; they forget it."""
    taken: list[OptimizerState] = []
    for optimizer in optimizers:
        state: OptimizerState = {}
        for parameter in [p for p in optimizer.state if id(p) in names]:
            values = optimizer.state.pop(parameter)
            state[names[id(parameter)]] = {k: to_host(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        taken.append(state)
    return taken


def give_optimizer_state(
    optimizers: Sequence[Optimizer], parameters: dict[str, nn.Parameter], states: Sequence[OptimizerState]
) -> None:
    """Puts back what `take_optimizer_state` took, for the parameters that the optimizers hold now."""
    for optimizer, state in zip(optimizers, states):
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, values in state.items():
            parameter = parameters.get(name)
            if parameter is None or id(parameter) not in groups:
                continue
            group = groups[id(parameter)]
            counts_there = bool(group.get("capturable") or group.get("fused"))
            optimizer.state[parameter] = {
                k: _beside(v, parameter, counts_there) if isinstance(v, Tensor) else v for k, v in values.items()
            }


def blank_optimizer_state(states: Sequence[OptimizerState]) -> list[OptimizerState]:
    """What the optimizers would start from, for those whose start is zeros (SGD's and Adam's kinds); else nothing."""
    zeros = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    return [
        {
            name: {k: torch.zeros_like(v) if isinstance(v, Tensor) else 0 for k, v in values.items()}
            for name, values in state.items()
            if values.keys() <= zeros
        }
        for state in states
    ]


def _beside(host: Tensor, parameter: Tensor, counts_there: bool) -> Tensor:
    """A copy where the optimizer keeps it: moments lie as their parameter does, step counters on the host or there."""
    part = local(parameter.detach())
    if host.ndim == 0 and not counts_there:
        return host.clone()
    moved = host.to(part.device, copy=True)
    return _sharded(moved, parameter) if host.ndim and host.shape == part.shape else moved


def _sharded(part: Tensor, like: Tensor) -> Tensor:
    """This process's part as the DTensor that `like` is; as it is where `like` is none."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def map_tensors(function: Any, state: Any, parameters: dict[str, nn.Parameter], name: str | None = None) -> Any:
    """A copy of nested dicts and lists with `function(tensor, parameter)` for tensors below a parameter's name."""
    if isinstance(state, dict):
        return {k: map_tensors(function, v, parameters, k if k in parameters else name) for k, v in state.items()}
    if isinstance(state, list):
        return [map_tensors(function, value, parameters, name) for value in state]
    return function(state, parameters[name]) if isinstance(state, Tensor) and name is not None else state
