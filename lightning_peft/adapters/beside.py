"""Modules beside a transformer's own, as PEFT tuners: what the techniques of this folder share.

LoRA and its relatives change a matrix. The techniques here add something that is not a change of weights (a bottleneck
after the feed-forward part, vectors on special tokens, a path beside the blocks) to what a module of the network reads
or returns. Each finds its places by the network's structure, wraps the module there and keeps the rest of PEFT: several
adapters, on and off, `save_pretrained`, `PeftModel.from_pretrained`. None can be merged. They do not touch the
network's matrices, so a base in 4 or 8 bits makes no difference.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from lightning_peft.adapters import register_with_peft
from lightning_peft.sublayers import unwrapped


@dataclass
class BesideConfig(PeftConfig):
    """What every config here has.

    Args:
        layers_to_transform: Positions of the blocks that get the adapter, from 0 (in an encoder-decoder, in each of the
            two stacks); by default all.
        modules_to_save: Names of modules that train whole, besides the task's own heads.
    """

    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    target_modules: ClassVar[None] = None  # places come from the network's structure

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]

    def transforms(self, index: int) -> bool:
        """Whether the block at this position gets the adapter."""
        return self.layers_to_transform is None or index in self.layers_to_transform  # type: ignore[operator]


class Tap:
    """Keeps the tensor that a module reads (or returns) until a module further on in the same block takes it.

    Hooks are bound methods, so copies of a network have taps of their own. Recomputation runs them again.

    Args:
        width: For `returned`, how much of the last dimension to keep; by default all.
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width
        self.value: Tensor | None = None
        self.normed: Tensor | None = None
        self.residual: Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keeps the module's first tensor, or, if a norm made it, what that norm read."""
        value = first_tensor(args, kwargs)
        self.value = self.residual if value is self.normed else value
        self.normed = self.residual = None

    def norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of a norm: remembers what it read and made."""
        self.residual, self.normed = args[0], output

    def returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keeps what the module returns."""
        self.value = head(output)[..., : self.width]

    def take(self) -> Tensor:
        """The tensor, which is let go of.

        Raises:
            RuntimeError: The module that reads it has not run in this forward.
        """
        if self.value is None:
            raise RuntimeError(
                "an adapter's layer ran without the layer before it in its block, whose input it reads: call the "
                "block as a whole."
            )
        value, self.value = self.value, None
        return value


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was called on, positional or by the name that transformers uses."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def head(output: Any) -> Tensor:
    """The hidden states of what a module returned, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call on another first tensor."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs)): value}


def with_head(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class BesideLayer(nn.Module, BaseTunerLayer):
    """A module of the network with adapters beside it: what `forward` adds is the technique's.

    Subclasses name their `nn.ModuleDict` of adapters in `adapter_layer_names`.

    Args:
        base_layer: The network's module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.places: dict[str, Any] = {}  # of each adapter, what the technique knows of the place
        self.merged_adapters: list[str] = []
        self.hooks: list[Any] = []
        (self.container,) = self.adapter_layer_names
        setattr(self, self.container, nn.ModuleDict())

    def __getattr__(self, name: str) -> Any:
        """Networks look at their blocks' attributes (`layer.attention_type`): those of the wrapped module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def add(self, adapter_name: str, adapter: nn.Module, place: Any, like: Tensor) -> None:
        """Takes an adapter in.

        Args:
            adapter_name: Its name.
            adapter: The adapter.
            place: What the technique knows of the place.
            like: A tensor of the network, for device and dtype.
        """
        self.places[adapter_name] = place
        if not any(p.is_meta for p in adapter.parameters()) and not like.is_meta:
            adapter.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        self._modules[self.container][adapter_name] = adapter.train(self.training)

    def active(self) -> Iterator[tuple[str, Any]]:
        """Name and adapter of each that acts, in the order in which they are active."""
        if self.disable_adapters:
            return
        adapters: Any = self._modules[self.container]
        yield from ((name, adapters[name]) for name in self.active_adapters if name in adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not a change of weights (it is not linear, or reads other tokens), so it cannot "
            "be merged into the network: keep it as an adapter (save_pretrained, or export without merge)"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def remove_hooks(self) -> None:
        """Takes the hooks off the network's modules."""
        while self.hooks:
            self.hooks.pop().remove()


class BesideModel(BaseTuner):
    """A tuner whose layers stand at places that it finds itself.

    Subclasses answer two questions: `find_places` (name of the module to wrap -> what they need to know of it) and
    `adapter_for` (the adapter at a place); `connect` sets the hooks that an adapter's layer needs.
    """

    layer_class: type[BesideLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]
    places: dict[str, Any]

    @abstractmethod
    def find_places(self, config: Any, network: nn.Module) -> dict[str, Any]:
        """Name of each module to wrap -> what `adapter_for` and the layer are given."""

    @abstractmethod
    def adapter_for(self, config: Any, place: Any) -> nn.Module:
        """A fresh adapter."""

    def layer_for(self, place: Any) -> type[BesideLayer]:
        """The class of the layer at a place."""
        return self.layer_class

    def connect(self, layer: Any, adapter_name: str, config: Any) -> None:
        """Sets the hooks that a layer's new adapter needs on the network's modules; they go on `layer.hooks`."""

    # -- what PEFT calls ----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        found = self.find_places(peft_config, model)
        if not found:
            raise ValueError(
                f"{type(peft_config).__name__}: no block of {type(model).__name__} is at "
                f"layers_to_transform={peft_config.layers_to_transform}."
            )
        layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        inside = [name for name in found if any(name.startswith(f"{layer}.") for layer in layers)]
        if inside:
            raise ValueError(
                f"{inside[0]} lies inside a module that another adapter wraps: add the adapter that sits further out "
                "last."
            )
        self.places = found

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self.places

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self.places[current_key]
        layer: Any = target
        if not isinstance(target, BesideLayer):
            layer = self.layer_for(place)(target)
            layer.train(target.training)
            unwrapped(parent)._modules[target_name] = layer  # the parent may have been wrapped just before
        adapter = self.adapter_for(peft_config, place)
        layer.add(adapter_name, adapter, place, like=self._like(current_key))
        self.connect(layer, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)

    def _like(self, name: str) -> Tensor:
        """A weight near a module: its own, else of what it stands in."""
        while True:
            near: Any = self.model.get_submodule(name)
            weight = next((p for p in near.parameters() if p.is_floating_point()), None)
            if weight is not None:
                return weight
            if not name:
                return torch.empty(0)
            name = name.rpartition(".")[0]

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, BesideLayer)]
        if merge and layers:
            layers[0][1].merge()
        for name, layer in reversed(layers):
            parent, _, own = name.rpartition(".")
            layer.remove_hooks()
            self.model.get_submodule(parent)._modules[own] = layer.base_layer
        super()._unload_and_optionally_merge(merge=False)  # modules_to_save
        return self.model

    def _check_merge_allowed(self) -> None:
        next(m for m in self.model.modules() if isinstance(m, BesideLayer)).merge()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's own rule expects the name last or second to last; our adapters are modules of several parts."""
        own = re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key)
        return own if own != key else super()._remove_adapter_name_from_key(key, adapter_name)


register_with_peft()
