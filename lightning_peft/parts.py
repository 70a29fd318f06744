"""Parts of a weight that train: rows, columns, experts of a 3-D tensor, or scattered entries.

A part's leaf is a parameter of just the part's size, registered beside its weight, so that whoever asks a module for
its parameters (optimizers, DDP, FSDP2) finds it. The weight is frozen and always holds the part's current values: the
leaf is written into it after every optimizer step, so a forward is the layer's own product. Gradient and optimizer
state have the part's size (`part_gradients`). The leaf is not in the module's state: checkpoints have the module's own
keys and current values, and what is loaded into the weight reaches the leaf.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.host_copies import local, sum_over_shards
from lightning_peft.part_gradients import Tie, stand_in


class Part:
    """Which entries of a weight.

    Args:
        dim: Dimension of the weight, as it is stored, that `index` counts along; None for flat positions.
        index: Different positions, [n]; negative ones are not counted from the end.

    Raises:
        ValueError: The positions are none, negative, or not all different.
    """

    def __init__(self, dim: int | None, index: Sequence[int] | Tensor) -> None:
        self.dim = dim
        self.index = torch.as_tensor(index, dtype=torch.long, device="cpu").flatten()
        if not len(self.index):
            raise ValueError("a part of no entries cannot train: give at least one position.")
        if int(self.index.min()) < 0 or len(self.index.unique()) < len(self.index):
            raise ValueError("a part's positions must be 0 or more and all different.")
        first = int(self.index[0])
        consecutive = torch.equal(self.index, torch.arange(first, first + len(self.index)))
        #: Where a run of neighbours begins: it is reached without a copy. None for any other set.
        self.start = first if consecutive and dim is not None else None
        self._on: dict[torch.device, Tensor] = {}

    @classmethod
    def block(cls, dim: int, start: int, length: int, size: int) -> Part:
        """`length` neighbours from `start` on, counted modulo `size`: at the edge they go on at the beginning."""
        return cls(dim, [(start + i) % size for i in range(length)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and self.dim == other.dim and torch.equal(self.index, other.index)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.index)

    def index_on(self, device: torch.device) -> Tensor:
        """The positions, on a device."""
        if device not in self._on:
            self._on[device] = self.index.to(device)
        return self._on[device]

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """The leaf's shape for a weight's.

        Raises:
            ValueError: A position is not in the weight.
        """
        size = torch.Size(weight).numel() if self.dim is None else weight[self.dim]
        if int(self.index.max()) >= size:
            where = "entries" if self.dim is None else f"positions along dimension {self.dim}"
            raise ValueError(f"position {int(self.index.max())} is not in a weight of {size} {where}.")
        if self.dim is None:
            return (len(self.index),)
        return (*weight[: self.dim], len(self.index), *weight[self.dim + 1 :])

    def take(self, weight: Tensor) -> Tensor:
        """The entries' values; of neighbours a view."""
        if self.dim is None:
            return weight.flatten()[self.index_on(weight.device)]
        if self.start is not None:
            return weight.narrow(self.dim, self.start, len(self.index))
        return weight.index_select(self.dim, self.index_on(weight.device))

    def put_(self, weight: Tensor, values: Tensor) -> None:
        """Writes the entries' values."""
        if self.dim is None:
            weight.view(-1).index_copy_(0, self.index_on(weight.device), values)
        elif self.start is not None:
            weight.narrow(self.dim, self.start, len(self.index)).copy_(values)
        else:
            weight.index_copy_(self.dim, self.index_on(weight.device), values)

    # -- gradients of products (see part_gradients) ---------------------------------------------------------------

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Position -> its place in the leaf."""
        return {position: place for place, position in enumerate(self.index.tolist())}

    def places(self, size: int, device: torch.device) -> Tensor:
        """For every position along the dimension its place in the leaf, -1 for what is frozen; [size]."""
        places = torch.full((size,), -1, device=device)
        places[self.index_on(device)] = torch.arange(len(self.index), device=device)
        return places

    def kept_inputs(self, x: Tensor, dtype: torch.dtype, shape: torch.Size, in_out: bool) -> Tensor:
        """What the gradient needs of a linear layer's input x [T, in]: some columns [n, T], or, for rows, x itself."""
        if self.dim is None:
            columns = self._out_and_in(x.device, shape, in_out)[1]
            return x[:, columns].to(dtype)
        if self._along_inputs(in_out):
            # A copy, or the whole of x would stay.
            return self._columns(x).t().to(dtype, copy=True, memory_format=torch.contiguous_format)
        return x

    def gradient(self, dy: Tensor, kept: Tensor, shape: torch.Size, in_out: bool) -> Tensor:
        """d loss / d part of y = x W^T, from dy [T, out] and what `kept_inputs` gave; W as [in, out] if `in_out`."""
        if self.dim is None:  # dW[i, j] = sum_t dY[t, i] X[t, j]
            rows = self._out_and_in(dy.device, shape, in_out)[0]
            return (dy[:, rows] * kept).sum(0)
        if self._along_inputs(in_out):
            made = kept @ dy  # [n, out]: the long side last is the faster way round
            return made if in_out else made.t()
        dy = self._columns(dy)
        return kept.t() @ dy if in_out else dy.t() @ kept

    def _along_inputs(self, in_out: bool) -> bool:
        return self.dim == (0 if in_out else 1)

    def _columns(self, x: Tensor) -> Tensor:
        return x.narrow(1, self.start, len(self)) if self.start is not None else x[:, self.index_on(x.device)]

    def _out_and_in(self, device: torch.device, shape: torch.Size, in_out: bool) -> tuple[Tensor, Tensor]:
        index = self.index_on(device)
        first, second = index // shape[1], index % shape[1]
        return (second, first) if in_out else (first, second)

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        return {"dim": self.dim, "index": self.index}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Part:
        """What `state` gave."""
        return cls(state["dim"], state["index"])


# -- leaves -----------------------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """What a module with leaves knows of them: leaf -> (weight, part), and the forward that stood on the instance."""

    leaves: dict[str, tuple[str, Part]] = field(default_factory=dict)
    forward: Any = None


def leaves_of(module: nn.Module) -> dict[str, str]:
    """Leaf -> weight, for the parts that a module trains itself."""
    parts = module.__dict__.get("_parts")
    return {} if parts is None else {leaf: weight for leaf, (weight, _) in parts.leaves.items()}


def leaf_name(weight: str, part: Part) -> str:
    """Name of the parameter that trains a part of `weight`: one for each dimension."""
    return f"{weight}_part{'' if part.dim is None else part.dim}"


class PartLeaf:
    """The leaf of a part on its module; `detach` leaves nothing behind.

    FSDP2 holds on to the parameters it was given, so on a sharded module the leaf has to stay, resting, and the next
    one of its name and shape is the same.

    Args:
        owner: The module whose parameter trains in part.
        weight: The parameter's name in it.
        part: Where it is at first.

    Raises:
        ValueError: The part is not in the weight, or the weight is sharded already.
    """

    def __init__(self, owner: nn.Module, weight: str, part: Part) -> None:
        self.owner, self.weight_name, self.name = owner, weight, leaf_name(weight, part)
        parameter = self.weight
        if self.name in leaves_of(owner):
            self._handles: list[Any] = []
            self.move(part)
            return
        if _is_sharded(parameter):
            raise ValueError(f"{type(owner).__name__}.{weight} is sharded already: its leaf has to be made before.")
        leaf = torch.empty(part.shape(parameter.shape), dtype=parameter.dtype, device=parameter.device)
        if not parameter.is_meta:
            leaf.copy_(part.take(parameter.detach()))
        owner.register_parameter(self.name, nn.Parameter(leaf))
        parts = owner.__dict__.get("_parts")
        if parts is None:
            parts = owner.__dict__["_parts"] = _Parts(forward=owner.__dict__.get("forward"))
            owner.__dict__["forward"] = types.MethodType(_forward, owner)  # a method: deepcopy binds it to the copy
        parts.leaves[self.name] = (weight, part)
        self._handles = [
            owner._register_state_dict_hook(_out_of_state),
            owner._register_load_state_dict_pre_hook(_into_leaves, with_module=True),
        ]

    @property
    def weight(self) -> Tensor:
        found = self.owner._parameters[self.weight_name]
        assert found is not None
        return found

    @property
    def leaf(self) -> Tensor:
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    @property
    def part(self) -> Part:
        return self.owner.__dict__["_parts"].leaves[self.name][1]

    def move(self, part: Part) -> None:
        """Goes on at another place of the weight, the same parameter with the values that stand there.

        Under FSDP2 the module must be sharded (not gathered for a forward) when it is called, on every rank.

        Raises:
            ValueError: The part has another shape there.
        """
        if leaf_name(self.weight_name, part) != self.name or part.shape(self.weight.shape) != tuple(self.leaf.shape):
            raise ValueError(
                f"the leaf {self.name} of shape {tuple(self.leaf.shape)} cannot become a part of shape "
                f"{part.shape(self.weight.shape)} along dimension {part.dim}: its shape and dimension are fixed."
            )
        self.owner.__dict__["_parts"].leaves[self.name] = (self.weight_name, part)
        self.pull()

    @torch.no_grad()
    def pull(self) -> None:
        """Takes the weight's values."""
        local(self.leaf.detach()).copy_(local(taken(self.weight, self.part, self.leaf)))

    def detach(self) -> None:
        """Takes the leaf off its module, or lets it rest there where it is sharded. The weight keeps the values."""
        if _is_sharded(self.leaf):
            self.leaf.requires_grad_(False)
            self.leaf.grad = None
            return
        parts = self.owner.__dict__["_parts"]
        del parts.leaves[self.name], self.owner._parameters[self.name]
        for handle in self._handles:
            handle.remove()
        if not parts.leaves:
            del self.owner.__dict__["_parts"], self.owner.__dict__["forward"]
            if parts.forward is not None:
                self.owner.__dict__["forward"] = parts.forward


@torch.no_grad()
def write_back(leaves: Iterable[PartLeaf]) -> None:
    """Writes the leaves' values into their weights; a collective call where they are sharded."""
    to, values = [], []
    for one in leaves:
        weight, leaf, part = one.weight, one.leaf, one.part
        if _is_sharded(weight):
            _put_sharded(weight, leaf, part)
        elif part.start is not None:
            to.append(part.take(weight))
            values.append(leaf)
        else:
            part.put_(weight, leaf)
    if to:
        torch._foreach_copy_(to, values)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, with a `PartWeight` in the place of each weight that trains in part."""
    parts: _Parts = self.__dict__["_parts"]
    forward = parts.forward or types.MethodType(type(self).forward, self)
    stands = {}
    if torch.is_grad_enabled():
        for name, (weight, part) in parts.leaves.items():
            leaf = self._parameters[name]
            if leaf is not None and leaf.requires_grad:
                stands[weight] = stand_in(self._parameters[weight], leaf, part)  # type: ignore[arg-type]
    # An attribute of the instance is found before its parameters, which stay what and where they are.
    self.__dict__.update(stands)
    try:
        output = forward(*args, **kwargs)
    finally:
        for weight in stands:
            self.__dict__.pop(weight, None)
    for stand in stands.values():
        if not stand.used[0]:  # experts that no token went to: DDP waits for every gradient
            output = _tied(output, stand.leaf)
    return output


def _tied(output: Any, leaf: Tensor) -> Any:
    if isinstance(output, Tensor):
        return Tie.apply(output, leaf)
    if isinstance(output, tuple) and output:
        return (_tied(output[0], leaf), *output[1:])
    return output


def _out_of_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for leaf in leaves_of(module):
        state.pop(f"{prefix}{leaf}", None)


def _into_leaves(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded into the weight, its leaf takes as well."""
    parts = module.__dict__.get("_parts")
    for name, (weight, part) in parts.leaves.items() if parts is not None else ():
        loaded, leaf = state.get(f"{prefix}{weight}"), module._parameters[name]
        fits = isinstance(loaded, Tensor) and loaded.shape == module._parameters[weight].shape  # type: ignore[union-attr]
        state[f"{prefix}{name}"] = taken(loaded, part, leaf) if fits else leaf  # type: ignore[arg-type]


# -- sharded weights --------------------------------------------------------------------------------------------------


@torch.no_grad()
def taken(weight: Tensor, part: Part, leaf: Tensor) -> Tensor:
    """The part's values in a weight, placed as its leaf is; a collective call where they are sharded."""
    if not _is_sharded(weight):
        return part.take(weight.detach())
    from torch.distributed.tensor import DTensor

    assert isinstance(leaf, DTensor)
    start, length = _rows(leaf)
    if part.dim:  # the leaf's rows are the weight's: nothing has to be sent
        values = part.take(local(weight.detach()))
    else:
        here, mine = _positions_here(weight, part)
        whole = local(weight.detach()).new_zeros(leaf.shape)
        whole[mine] = _entries(weight, part)[here]
        values = sum_over_shards(whole, weight)[start : start + length]
    return DTensor.from_local(
        values, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )


def _put_sharded(weight: Tensor, leaf: Any, part: Part) -> None:
    if part.dim:
        part.put_(local(weight.detach()), local(leaf.detach()))
        return
    here, mine = _positions_here(weight, part)
    _entries(weight, part)[here] = leaf.detach().full_tensor()[mine]


def _is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _rows(tensor: Any) -> tuple[int, int]:
    """The first row that lies in this process, and how many do."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements):
        raise ValueError(
            f"a weight placed as {tensor.placements} cannot train in part: parts go with FSDP2 along the first "
            "dimension, not with tensor parallelism."
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]


def _entries(weight: Tensor, part: Part) -> Tensor:
    here = local(weight.detach())
    return here.view(-1) if part.dim is None else here


def _positions_here(weight: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Positions of the part that lie in this process, counted from its first row on, and which of the part they are."""
    start, length = _rows(weight)
    row = weight.shape[1:].numel() if part.dim is None else 1
    index = part.index_on(local(weight).device)
    mine = (index >= start * row) & (index < (start + length) * row)
    return index[mine] - start * row, mine
