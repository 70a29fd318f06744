"""Training in a random subspace: how few numbers does a task need? (arXiv 2012.13255, paper 114)

    theta_i = theta0_i + lambda_i P_i z        z [d], one lambda a weight (structure-aware, "SAID"), P_i from a seed

z (from 0) and the lambdas (from 1) train; P_i is a Fastfood projection that keeps lengths. The authors' code (fastfood
in rabeehk/compacter) pads z to the size of each weight and transforms that once; here blocks of d's own size fill a
weight, as Fastfood is defined, at O(D log d).
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.fastfood import PROJECTIONS
from lightning_peft.network_record import network_fingerprint
from lightning_peft.roles import Weight, inner_model

Z, LAMBDAS = "intrinsic_z", "intrinsic_lambdas"
METHOD = "intrinsic-dimension"


class IntrinsicDimension(WeightSelection):
    """Trains d numbers in place of the network's weights, and a task's head as ever; nothing of it is left behind.

    The weights hold their current values throughout, so checkpoints and exports are the network's own; the d numbers
    are in the callback's state, and `save` writes them alone. A backward makes each layer's whole gradient, projects it
    to d numbers and drops it at once; a copy of the weights' starting values is kept. An output matrix, and weights
    that several modules share (a tied embedding), stay as they are.

    Args:
        d: How many numbers train: z, and with `structure_aware` a scalar for every weight.
        projection: "fastfood", or "dense" for small sizes.
        structure_aware: A scalar for every weight (SAID); else all have the same scale.
        seed: Seed of the projections.
        train_head: Train a task's head whole, outside of the subspace.
        picture: Write a map of what trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: An argument is out of range, there are more scalars than d, a weight is quantised, or the strategy
            shards weights, of whose shards no one holds a whole gradient to project.
    """

    needs_blocks = False

    def __init__(
        self,
        d: int = 1000,
        projection: str = "fastfood",
        structure_aware: bool = True,
        seed: int = 0,
        train_head: bool = True,
        picture: bool = False,
    ) -> None:
        super().__init__("never", picture)
        if d < 1:
            raise ValueError(f"d={d} must be at least 1.")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection={projection!r} is not known: use one of {sorted(PROJECTIONS)}.")
        self.d, self.projection, self.structure_aware = d, projection, structure_aware
        self.seed, self.train_head = seed, train_head
        self._network: nn.Module | None = None
        self._places: list[_Place] = []
        self._restored: dict[str, Tensor] | None = None
        self._base = ""  # fingerprint of the weights it starts from

    def arguments(self) -> dict[str, Any]:
        names = ("d", "projection", "structure_aware", "seed", "train_head")
        return {name: getattr(self, name) for name in names}

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "numbers": self.numbers(), "base": self._base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self._base and state_dict["base"] != self._base:
            raise ValueError(
                "IntrinsicDimension: the checkpoint's numbers are steps away from another network than this run "
                "started from: load the same base."
            )
        self._restored = dict(state_dict["numbers"])

    def numbers(self) -> dict[str, Tensor]:
        """z and lambdas as they are; empty before the first fit."""
        if self._network is None:
            return dict(self._restored or {})
        named = dict(self._network.named_parameters(recurse=False))
        return {name: named[name].detach().clone() for name in (Z, LAMBDAS) if name in named}

    def save(self, path: str | Path) -> Path:
        """Writes the numbers, a few kilobytes, with what `apply_intrinsic` needs to make the weights of them again.

        Raises:
            ValueError: There are none yet.
        """
        from safetensors.torch import save_file

        numbers = self.numbers()
        if not numbers:
            raise ValueError("there are no numbers to save: fit first.")
        about = {"method": METHOD, "base": self._base, "projection": self.projection, "seed": self.seed}
        tensors = {name: value.float().cpu().contiguous() for name, value in numbers.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"about": json.dumps(about)})
        return Path(path)

    # -- fit ------------------------------------------------------------------------------------------------------

    def _refuse(self, trainer: L.Trainer) -> None:
        super()._refuse(trainer)
        if type(trainer.strategy).__name__ == "ModelParallelStrategy":
            raise ValueError(
                "IntrinsicDimension projects every layer's whole gradient, and ModelParallelStrategy (FSDP2) shards "
                "it: use strategy='ddp'."
            )

    def _begin(self, pl_module: L.LightningModule) -> None:
        network = self._network = inner_model(pl_module)
        self._base = network_fingerprint(network)
        projected = list(_projected(network))
        scalars = len(projected) if self.structure_aware else 0
        if scalars >= self.d:
            raise ValueError(
                f"d={self.d} leaves nothing for z: {scalars} weights take a scalar each. Use a larger d, or "
                "structure_aware=False."
            )
        like = projected[0][2]
        network.register_parameter(Z, nn.Parameter(torch.zeros(self.d - scalars, dtype=like.dtype, device=like.device)))
        if scalars:
            network.register_parameter(LAMBDAS, nn.Parameter(torch.ones(scalars, dtype=like.dtype, device=like.device)))
        self._handles = [
            network._register_state_dict_hook(_out_of_state),
            network.register_load_state_dict_pre_hook(_into_state),
        ]
        make = PROJECTIONS[self.projection]
        for number, (owner, name, weight, full) in enumerate(projected):
            projection = make(self.d - scalars, weight.numel(), self.seed, full)
            self._places.append(_Place(network, owner, name, full, projection, number if scalars else None))
        super()._begin(pl_module)

    def candidates(self, weights: list[Weight]) -> set[str]:
        return {w.name for w in weights if w.role not in ("adapter", "beside") or _is_number(w.name)}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        output = self._network.get_output_embeddings() if hasattr(self._network, "get_output_embeddings") else None
        head = self.train_head and output is None
        return {w.name for w in weights if _is_number(w.name) or (head and w.role == "head")}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored and self._network is not None:
            own = dict(self._network.named_parameters(recurse=False))
            for name, value in self._restored.items():
                own[name].data.copy_(value)
            self._restored = None
        self._stepped()
        super().on_train_start(trainer, pl_module)

    def _stepped(self) -> None:
        for place in self._places:
            place.refresh()

    def share(self, weight: Weight) -> float:
        """1 for what the numbers move or what trains whole."""
        return float(weight.name in self._selected or any(weight.name.endswith(p.full) for p in self._places))

    def _release(self) -> None:
        network = self._network
        if network is not None:
            self._restored = self.numbers()
        super()._release()
        for place in self._places:
            place.detach()
        if network is not None:
            for handle in self._handles:
                handle.remove()
            for name in (Z, LAMBDAS):
                network._parameters.pop(name, None)
        self._places, self._network = [], None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._restored = None  # a new fit starts from the weights as they stand
        super().setup(trainer, pl_module, stage)


class _Place:
    """A weight that moves in the subspace: its module computes with theta0 + lambda P z, whose gradient goes to both.

    Args:
        network: Has z and the lambdas.
        owner: The module that has the weight.
        name: Its name there.
        full: Its name in the network.
        projection: P.
        number: Which lambda is its own.
    """

    def __init__(
        self, network: nn.Module, owner: nn.Module, name: str, full: str, projection: Any, number: int | None
    ) -> None:
        self.network, self.owner, self.name, self.full = network, owner, name, full
        self.projection, self.number = projection, number
        self.start = self.weight.detach().clone()
        places: list[_Place] | None = owner.__dict__.get("_intrinsic")
        if places is None:
            places = owner.__dict__["_intrinsic"] = []
            owner.__dict__["_intrinsic_forward"] = owner.__dict__.get("forward")
            owner.__dict__["forward"] = types.MethodType(_forward, owner)  # a method: deepcopy binds it to the copy
        places.append(self)

    @property
    def weight(self) -> Tensor:
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        z, lambdas = self.network._parameters[Z], self.network._parameters.get(LAMBDAS)
        assert z is not None
        return z, None if lambdas is None or self.number is None else lambdas[self.number]

    def ready(self) -> Any:
        """The projection and the starting values, where the weight is now."""
        device = self.weight.device
        self.start = self.start.to(device)
        return self.projection.to(device)

    @torch.no_grad()
    def refresh(self) -> None:
        """theta = theta0 + lambda P z, from the start each time: nothing adds up over steps."""
        projection, (z, scalar) = self.ready(), self.numbers()
        change = projection(z)
        if scalar is not None:
            change.mul_(scalar.float())
        self.weight.copy_(change.view_as(self.weight).add_(self.start.float()))

    def stand_in(self) -> Tensor:
        """The weight, differentiable in z and lambda."""
        return InSubspace.apply(*self.numbers(), self.weight, self.ready())

    def detach(self) -> None:
        if self.owner.__dict__.pop("_intrinsic", None) is None:
            return  # with another of the module's weights
        before = self.owner.__dict__.pop("_intrinsic_forward")
        del self.owner.__dict__["forward"]
        if before is not None:
            self.owner.__dict__["forward"] = before


class InSubspace(torch.autograd.Function):
    """theta [...] as it stands; d loss / d z = lambda P^T g and d loss / d lambda = <P z, g> = <z, P^T g>."""

    @staticmethod
    def forward(ctx, z, scalar, weight, projection):  # type: ignore[no-untyped-def]
        ctx.projection = projection
        ctx.save_for_backward(z, scalar)
        return weight.detach().view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        z, scalar = ctx.saved_tensors
        projected = ctx.projection.transposed(g.flatten())
        if scalar is None:
            return projected.to(z.dtype), None, None, None
        return (scalar.float() * projected).to(z.dtype), (z.float() @ projected).to(scalar.dtype), None, None


def apply_intrinsic(network: nn.Module, path: str | Path) -> None:
    """Makes a base's weights the trained ones, from what `IntrinsicDimension.save` wrote. A head is not in the file.

    Args:
        network: The base that the run started from.
        path: The file.

    Raises:
        ValueError: The file is something else's, or another base's.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, no dictionary)
    if about.get("method") != METHOD:
        raise ValueError(f"{path} holds no numbers of IntrinsicDimension.save.")
    if about["base"] != network_fingerprint(network):
        raise ValueError(f"{path} holds steps away from another network: load the base that its run started from.")
    z, lambdas = numbers[Z], numbers.get(LAMBDAS)
    with torch.no_grad():
        for number, (_, _, weight, full) in enumerate(_projected(network)):
            projection = PROJECTIONS[about["projection"]](len(z), weight.numel(), about["seed"], full)
            change = projection(z) if lambdas is None else projection(z).mul_(lambdas[number])
            weight.copy_(change.view_as(weight).to(weight.device).add_(weight.float()))


def _projected(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, str]]:
    """Module, name, weight and qualified name of every weight that the numbers move, in order."""
    from lightning_peft.roles import weights_by_role

    uses: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for weight in weights_by_role(network, need_blocks=False):
        parameter = network.get_parameter(weight.name)
        kept = weight.role in ("head", "adapter", "beside") or _is_number(weight.name)
        if not kept and uses[id(parameter)] == 1 and parameter.is_floating_point():
            path, _, own = weight.name.rpartition(".")
            yield network.get_submodule(path), own, parameter, weight.name


def _is_number(name: str) -> bool:
    return name.rpartition(".")[2] in (Z, LAMBDAS)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with its weights differentiable in z."""
    forward = self.__dict__["_intrinsic_forward"] or types.MethodType(type(self).forward, self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    places = self.__dict__["_intrinsic"]
    # An attribute of the instance is found before its parameters, which stay what and where they are.
    self.__dict__.update({place.name: place.stand_in() for place in places})
    try:
        return forward(*args, **kwargs)
    finally:
        for place in places:
            self.__dict__.pop(place.name, None)


def _out_of_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in (Z, LAMBDAS):
        state.pop(f"{prefix}{name}", None)


def _into_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint has the module's own keys: the numbers come with the callback's state."""
    for name in (Z, LAMBDAS):
        if name in module._parameters:
            state[f"{prefix}{name}"] = module._parameters[name]
