"""Bottleneck adapters in every form of the unified view (paper 38, arXiv 2110.04366), and Houlsby's and Pfeiffer's.

    sequential   h <- h + s f(h W_down) W_up      h what a part of the block returns           (eq. 4)
    parallel     h <- h + s f(x W_down) W_up      x what that part reads                       (table 1)

f is a nonlinearity, s = 4 fixed (scaled parallel adapter) or learned. MAM, the paper's own method, is prefix tuning
with a prefix of 30 on the attention (PEFT's) beside a scaled parallel adapter of size 512 on the feed-forward part: two
`callbacks.PEFT` in one run. Houlsby's adapters (papers 32 and 77) are `form="sequential", position="both", scale=1.0`,
Pfeiffer's `form="sequential", insertion="after", scale=1.0`.

Where the text leaves it open this follows the authors' code (jxhe/unify-parameter-efficient-tuning): in a pre-norm
block the parallel adapter of the feed-forward part reads the residual stream, before the norm; a parallel adapter of
the attention adds to the concatenated heads, before the output projection; the multi-head form takes each head's query
for its x and has no biases (the code puts a trained norm before that query projection, which ours leaves out: the query
is the one that the block computes anyway). Sequential adapters act after the dropout, as in the `adapters` library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters import add_peft_type, register_with_peft
from lightning_peft.adapters.beside import BesideConfig, BesideLayer, BesideModel, Tap, first_tensor, head, with_head
from lightning_peft.sublayers import Sublayer, attention_heads, in_features, out_features, sublayers, unwrapped

FORMS, POSITIONS, INSERTIONS = ("parallel", "sequential"), ("ffn", "attention", "both"), ("before", "after")
INITS, NORMS, READS = ("lora", "bert"), ("none", "in", "out"), ("residual", "sublayer")


@dataclass
class BottleneckConfig(BesideConfig):
    """Bottleneck adapters: h <- h + s f(x W_down) W_up, x the part's input (parallel) or output (sequential).

    Args:
        form: "parallel" (x is what the part of the block reads) or "sequential" (what it returns).
        position: "ffn", "attention" (cross-attention too) or "both".
        bottleneck: Size of the bottleneck (of each head's, with `multi_head`).
        scale: s, a number, or "learned": one number a layer, from 1.
        insertion: For the sequential form, "before" the residual is added (Houlsby), or "after": on the sum, through
            the norm in a post-norm block (Pfeiffer; feed-forward part only).
        activation: f, a name of transformers' activations such as "relu", "gelu", "silu", "tanh", or "linear".
        init: "lora" (W_up zero, so the network starts unchanged) or "bert" (normal, standard deviation 0.02).
        multi_head: One adapter a head, x the head's query; parallel on the attention only.
        parallel_input: What the parallel adapter of the feed-forward part reads where a norm stands before it:
            the "residual" stream, as the authors' code does, or what the "sublayer" reads, behind the norm. Networks
            with norms after each part but outside of it (BART, DistilBERT) want "sublayer".
        layer_norm: A trained norm on the adapter's input ("in"), on its output ("out"), or "none".
        dropout: Dropout inside the bottleneck.
        layers_to_transform: Positions of the blocks that get adapters, from 0 (in an encoder-decoder, in each of the
            two stacks); by default all.
        modules_to_save: Names of modules that train whole, besides the task's own heads.

    Raises:
        ValueError: A value is not one of those named, or two do not go together.
    """

    form: Literal["parallel", "sequential"] = "parallel"
    position: Literal["ffn", "attention", "both"] = "ffn"
    bottleneck: int = 512
    scale: float | str = 4.0
    insertion: Literal["before", "after"] = "before"
    activation: str = "relu"
    init: Literal["lora", "bert"] = "lora"
    multi_head: bool = False
    parallel_input: Literal["residual", "sublayer"] = "residual"
    layer_norm: Literal["none", "in", "out"] = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("bottleneck")
        for name, known in (
            ("form", FORMS),
            ("position", POSITIONS),
            ("insertion", INSERTIONS),
            ("init", INITS),
            ("layer_norm", NORMS),
            ("parallel_input", READS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {known}.")
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if isinstance(self.scale, str) and self.scale != "learned":
            raise ValueError(f"scale={self.scale!r} must be a number or 'learned'.")
        if self.insertion == "after" and (self.form, self.position) != ("sequential", "ffn"):
            raise ValueError("insertion='after' goes with form='sequential' and position='ffn'.")
        if self.multi_head and (self.form, self.position, self.layer_norm) != ("parallel", "attention", "none"):
            raise ValueError(
                "multi_head=True goes with form='parallel', position='attention' and layer_norm='none': it changes "
                "what each head returns."
            )
        activation(self.activation)


def activation(name: str) -> nn.Module:
    """An activation by its name in transformers.

    Raises:
        ValueError: There is none of this name.
    """
    from transformers.activations import ACT2CLS, ACT2FN

    if name not in ACT2CLS:
        from lightning_peft.adapters.configuration import closest

        raise ValueError(f"activation={name!r} is not known; {closest(name, ACT2CLS)}.")
    return ACT2FN[name]


class Place(NamedTuple):
    """Where an adapter acts and what it reads.

    Args:
        act: On what the module "reads" (the output projection), on what it "returns", or through a "norm".
        x: What the adapter reads: the "output" that it acts on, the "residual" stream or what the "sublayer" reads
            before it, or the "query".
        width: Size of x.
        out: Size of what the adapter returns.
        heads: Heads, for the multi-head form; 0 for one adapter.
        sublayer: The part of the block.
    """

    act: Literal["reads", "returns", "norm"]
    x: Literal["output", "residual", "sublayer", "query"]
    width: int
    out: int
    heads: int
    sublayer: Sublayer


class BottleneckAdapter(nn.Module):
    """s f(x W_down) W_up, zero at the start with `init="lora"`.

    Args:
        place: Sizes, and which x; in the multi-head form each head has its own slice of x and of the result.
        config: The rest.
    """

    def __init__(self, place: Place, config: BottleneckConfig) -> None:
        super().__init__()
        r, width, out, heads = config.bottleneck, place.width, place.out, place.heads
        self.x, self.heads = place.x, heads
        self.activation = activation(config.activation)
        self.dropout = nn.Dropout(config.dropout)
        self.down: Any
        self.up: Any
        if heads:
            self.down = nn.Parameter(torch.empty(heads, width // heads, r))
            self.up = nn.Parameter(torch.empty(heads, r, out // heads))
        else:
            self.down, self.up = nn.Linear(width, r), nn.Linear(r, out)
        self.norm = nn.LayerNorm({"in": width, "out": out}[config.layer_norm]) if config.layer_norm != "none" else None
        self.norm_in = config.layer_norm == "in"
        self.scale: Any = nn.Parameter(torch.ones(1)) if config.scale == "learned" else float(config.scale)
        self.reset_parameters(config.init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Starting values: LoRA's, with W_up and the biases zero, or BERT's."""
        matrices = [self.down, self.up] if self.heads else [self.down.weight, self.up.weight]
        if init == "bert":
            for matrix in matrices:
                matrix.normal_(std=0.02)
        else:
            # kaiming_uniform_(a=sqrt(5)) of a [r, width] matrix: uniform within 1 / sqrt(width).
            bound = 1 / math.sqrt(self.down.shape[1] if self.heads else self.down.in_features)
            matrices[0].uniform_(-bound, bound)
            matrices[1].zero_()
        if not self.heads:
            self.down.bias.zero_()
            self.up.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What is added, [..., out], from x [..., width]; in the adapter's own precision."""
        if self.heads:
            x = x.to(self.down.dtype).unflatten(-1, (self.heads, -1))
            hidden = self.dropout(self.activation(torch.einsum("...hd,hdr->...hr", x, self.down)))
            return (torch.einsum("...hr,hre->...he", hidden, self.up) * self.scale).flatten(-2)
        x = x.to(self.down.weight.dtype)
        if self.norm is not None and self.norm_in:
            x = self.norm(x)
        change = self.up(self.dropout(self.activation(self.down(x)))) * self.scale
        return self.norm(change) if self.norm is not None and not self.norm_in else change


class BottleneckLayer(BesideLayer):
    """A module of the network whose input or output has bottleneck adapters' results added to it."""

    adapter_layer_names = ("bottleneck_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.taps: dict[str, Tap] = {}

    def changed(self, h: Tensor) -> Tensor:
        """h with every active adapter's result added."""
        read = {x: tap.take() for x, tap in self.taps.items()}
        for _, adapter in self.active():
            h = h + adapter(read.get(adapter.x, h)).to(h.dtype)
        return h

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        act = next(iter(self.places.values())).act  # the same for all: it depends on the module
        if act == "reads":
            return self.base_layer(self.changed(first_tensor(args, kwargs)), *args[1:])
        output = self.base_layer(*args, **kwargs)
        if act == "returns":
            return with_head(output, self.changed(head(output)))
        # Pfeiffer in a post-norm block: norm(z + adapter(norm(z))), z the sum with the residual.
        z = first_tensor(args, kwargs)
        for _, adapter in self.active():
            z = z + adapter(output).to(z.dtype)
            output = self.base_layer(z)
        return output


class BottleneckModel(BesideModel):
    """The tuner of `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = layer_class = BottleneckLayer

    def find_places(self, config: BottleneckConfig, network: nn.Module) -> dict[str, Place]:
        kinds = {"ffn": ["ffn"], "attention": ["attention", "cross_attention"]}
        wanted = kinds.get(config.position, kinds["ffn"] + kinds["attention"])
        places: dict[str, Place] = {}
        for part in sublayers(network):
            if part.kind in wanted and config.transforms(part.index):
                name, place = self._place(config, part, network)
                places[name] = place
        return places

    def _place(self, config: BottleneckConfig, part: Sublayer, network: nn.Module) -> tuple[str, Place]:
        width = part.width
        if config.form == "sequential":
            if config.insertion == "before":
                return part.exit, Place("returns", "output", width, width, 0, part)
            if part.post_norm is not None:
                return part.post_norm, Place("norm", "output", width, width, 0, part)
            return part.block, Place("returns", "output", width, width, 0, part)
        if part.kind == "ffn":
            return part.exit, Place("returns", config.parallel_input, width, width, 0, part)
        if part.output is None:
            raise ValueError(f"{part.entry} has no output projection for a parallel adapter to add to.")
        inside = in_features(network.get_submodule(part.output))
        if not config.multi_head:
            return part.output, Place("reads", "sublayer", width, inside, 0, part)
        return part.output, Place("reads", "query", inside, inside, self._heads(part, inside, network), part)

    def _heads(self, part: Sublayer, inside: int, network: nn.Module) -> int:
        """Heads of an attention whose queries can be told from its keys."""
        query = network.get_submodule(part.query or part.entry)
        plain = part.query is not None and out_features(query) == inside
        if not plain and type(unwrapped(query)).__name__ != "Conv1D":  # GPT-2's has the queries first
            raise ValueError(
                f"multi_head=True: {part.query} makes queries, keys and values together in an order that is not known; "
                "use multi_head=False."
            )
        return attention_heads(network, part.entry)

    def adapter_for(self, config: BottleneckConfig, place: Place) -> BottleneckAdapter:
        return BottleneckAdapter(place, config)

    def connect(self, layer: BottleneckLayer, adapter_name: str, config: BottleneckConfig) -> None:
        place = layer.places[adapter_name]
        if place.x == "output" or place.x in layer.taps:
            return
        part, tap = place.sublayer, Tap(place.width)
        layer.taps[place.x] = tap
        if place.x == "query":
            query = unwrapped(self.model.get_submodule(part.query or ""))
            layer.hooks.append(query.register_forward_hook(tap.returned))
            return
        entry = unwrapped(self.model.get_submodule(part.entry))
        layer.hooks.append(entry.register_forward_pre_hook(tap.read, with_kwargs=True))
        for norm in part.norms if place.x == "residual" else ():
            layer.hooks.append(unwrapped(self.model.get_submodule(norm)).register_forward_hook(tap.norm))


register_with_peft()
