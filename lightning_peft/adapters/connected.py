"""Connected adapters: trainable modules that form one path from layer to layer (paper 16, arXiv 2208.09847).

The paper finds that adapters scattered over a frozen network are hard to train, as every gradient has to pass the
frozen layers between them, and adds, to the usual module inside each layer, one aside of it, joined from layer to layer
by skip connections ("inside and aside", IAA). No code is published and the figure with the three variants' wiring could
not be had, so the wiring is our choice:

    a_l = W_up f(W_down (h_l + s_(l-1)))      the block aside reads layer l's output and the path so far
    s_l = s_(l-1) + a_l                       and the path goes on by a skip connection, s_0 = 0
    h_l <- h_l + a_l                          what goes into the next layer (`feeds="layers"`; not with "head")
    h_L <- h_L + s_L                          the last layer's output, which the head reads, takes the whole path

so that the first block is one addition away from the head, whatever the frozen layers do. Inside each layer stands a
sequential bottleneck adapter on the feed-forward part. W_up starts at zero: the network starts unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters import add_peft_type, register_with_peft
from lightning_peft.adapters.beside import BesideConfig, BesideLayer, BesideModel, head, with_head
from lightning_peft.adapters.bottleneck import BottleneckAdapter, BottleneckConfig, BottleneckLayer
from lightning_peft.adapters.bottleneck import Place as InsidePlace
from lightning_peft.sublayers import sublayers

FEEDS = ("layers", "head")


@dataclass
class ConnectedAdapterConfig(BesideConfig):
    """Bottleneck blocks beside the layers, joined to a path that the head reads, and adapters inside the layers.

    Args:
        bottleneck: Size of the bottleneck of the blocks aside.
        inside: Size of the bottleneck of the adapters inside, 0 for none.
        feeds: "layers": a block's result also goes into the next layer; "head": the path meets the network at the end
            only, so that no gradient passes a frozen layer (but for the adapters inside).
        activation: A name of transformers' activations such as "relu" or "gelu".
        dropout: Dropout inside the bottlenecks.
        layers_to_transform: Positions of the blocks that take part, from 0 (in an encoder-decoder, in each of the two
            stacks); by default all. The path meets the network at the last of them.
        modules_to_save: Names of modules that train whole, besides the task's own heads.

    Raises:
        ValueError: A value is out of its range.
    """

    bottleneck: int = 64
    inside: int = 64
    feeds: Literal["layers", "head"] = "layers"
    activation: str = "gelu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("connected")
        if self.feeds not in FEEDS:
            raise ValueError(f"feeds={self.feeds!r} is not known: use one of {FEEDS}.")
        if self.inside < 0:
            raise ValueError(f"inside={self.inside} must be at least 0.")
        self.bottlenecks()

    def bottlenecks(self) -> tuple[BottleneckConfig, BottleneckConfig]:
        """The bottlenecks aside and inside, as configs."""
        shared: dict[str, Any] = {
            "form": "sequential",
            "scale": 1.0,
            "activation": self.activation,
            "dropout": self.dropout,
        }
        aside = BottleneckConfig(bottleneck=self.bottleneck, **shared)
        return aside, BottleneckConfig(bottleneck=max(self.inside, 1), **shared)


class Aside(NamedTuple):
    """Where a block of the path stands.

    Args:
        width: Size of the residual stream.
        first: Whether the path begins here.
        last: Whether it meets the network here.
        stack: Name of the list of layers that it is beside.
    """

    width: int
    first: bool
    last: bool
    stack: str


class Path:
    """The path's state between two layers of one forward."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def before(self, first: bool, like: Tensor) -> Tensor | None:
        """s_(l-1), `None` for zero.

        Raises:
            RuntimeError: The layers did not run one after the other.
        """
        if first:
            return None
        state, self.state = self.state, None
        if state is None or state.shape != like.shape:
            raise RuntimeError(
                "a connected adapter ran without the one in the layer before it: run the layers one after the other "
                "(checkpoint activations inside the layers, as transformers does, not around them)."
            )
        return state


class _Together(torch.autograd.Function):
    """Both tensors as they are; backward waits until both gradients are there.

    The path leaves a layer without being part of its output, on which FSDP2 hangs the hook that gathers the layer's
    weights for the backward: through this node nothing of the layer runs before that hook.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.view_as(hidden), path.view_as(path)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradients


class ConnectedLayer(BesideLayer):
    """A layer of the network with a block of the path beside it."""

    adapter_layer_names = ("connected_aside",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.paths: dict[str, Path] = {}
        self.feeds: dict[str, str] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        hidden = head(output)
        for name, block in self.active():
            hidden = self.beside(hidden, block, self.places[name], self.paths[name], self.feeds[name])
        return with_head(output, hidden)

    def beside(self, hidden: Tensor, block: nn.Module, place: Aside, path: Path, feeds: str) -> Tensor:
        """The layer's output with the path's part in it; the path goes on to the next layer."""
        before = path.before(place.first, hidden)
        change = block(hidden if before is None else hidden + before).to(hidden.dtype)  # a_l
        state = change if before is None else before + change  # s_l
        if place.last:
            return hidden + state
        hidden, path.state = _Together.apply(hidden + change if feeds == "layers" else hidden, state)
        return hidden


class InsideLayer(BottleneckLayer):
    """A feed-forward part with the adapter inside the layer."""

    adapter_layer_names = ("connected_inside",)


class ConnectedAdapterModel(BesideModel):
    """The tuner of `ConnectedAdapterConfig`."""

    prefix = "connected_"
    tuner_layer_cls = layer_class = BesideLayer

    def find_places(self, config: ConnectedAdapterConfig, network: nn.Module) -> dict[str, Any]:
        parts = [part for part in sublayers(network) if config.transforms(part.index)]
        blocks = list(dict.fromkeys(part.block for part in parts))
        stacks: dict[str, list[str]] = {}
        for block in blocks:
            stacks.setdefault(block.rpartition(".")[0], []).append(block)
        widths = {part.block: part.width for part in parts}
        places: dict[str, Any] = {}
        for stack, members in stacks.items():
            for block in members:
                places[block] = Aside(widths[block], block == members[0], block == members[-1], stack)
        if config.inside:
            for part in parts:
                if part.kind == "ffn":
                    places[part.exit] = InsidePlace("returns", "output", part.width, part.width, 0, part)
        return places

    def layer_for(self, place: Any) -> type[BesideLayer]:
        return ConnectedLayer if isinstance(place, Aside) else InsideLayer

    def adapter_for(self, config: ConnectedAdapterConfig, place: Any) -> nn.Module:
        aside, inside = config.bottlenecks()
        if isinstance(place, InsidePlace):
            return BottleneckAdapter(place, inside)
        part: Any = None
        return BottleneckAdapter(InsidePlace("returns", "output", place.width, place.width, 0, part), aside)

    def connect(self, layer: Any, adapter_name: str, config: ConnectedAdapterConfig) -> None:
        place = layer.places[adapter_name]
        if not isinstance(place, Aside):
            return
        layer.feeds[adapter_name], layer.paths[adapter_name] = config.feeds, Path()
        for other in self.model.modules():  # layers of one stack share their path
            known = isinstance(other, ConnectedLayer) and adapter_name in other.paths
            if known and other.places[adapter_name].stack == place.stack:
                layer.paths[adapter_name] = other.paths[adapter_name]
                return


register_with_peft()
