"""Selective LoRA (arXiv 2501.15377): LoRA blocks, each with a learned gate that is open or closed.

    y = W x + 1[s >= tau] * (alpha / r) * B A x,      d 1[s >= tau] / ds := 1      (straight through, as in TAPS)

One scalar s a block. A closed block adds exactly nothing, its A and B get no gradient, and its s still gets that of the
open block (g . B A x), so it may open again. The layers are PEFT's LoRA layers with a variant of their forward: plain,
convolutional and 4- or 8-bit ones. What is written to disk is ordinary LoRA on the open blocks alone, with a rank
pattern: plain `peft` loads it.

The paper publishes no code; tau = 0.1 and a start of 0.15 are those of TAPS by its first author (arXiv 2203.16708).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from lightning_peft.adapters import add_peft_type, register_with_peft

#: Starts of A and B that leave the base as it is: a closed gate then means the base itself.
INITS = (True, False, "gaussian")

#: What a saved adapter does not take over from the config: where its blocks are is said by name.
_PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules", "peft_type", "auto_mapping", "peft_version")


@dataclass
class SelectiveLoraConfig(LoraConfig):
    """LoRA whose blocks have a gate each: `LoraConfig` and two arguments more.

    Args:
        threshold: tau: a block acts while its gate is at least this.
        gate_init: Where the gates start.

    Raises:
        ValueError: The gates would start closed, or another variant of LoRA is asked for as well.
    """

    threshold: float = 0.1
    gate_init: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("selective_lora")
        if not 0 < self.threshold <= self.gate_init:
            raise ValueError(
                f"threshold={self.threshold} must lie above 0 and not above gate_init={self.gate_init}, or every block "
                "would start closed."
            )
        if self.lora_bias or self.init_lora_weights not in INITS:
            raise ValueError(
                f"Selective LoRA takes lora_bias=False and init_lora_weights in {INITS}: a closed block has to leave "
                f"the base as it was, and lora_bias={self.lora_bias}, init_lora_weights={self.init_lora_weights!r}."
            )

    def as_saved(
        self, network: nn.Module, adapter_name: str, state: dict[str, Tensor]
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Ordinary LoRA on the open blocks: what `lightning_peft.export` writes in this adapter's place.

        Args:
            network: The network with this adapter.
            adapter_name: Its name.
            state: What PEFT would save, by PEFT's names.

        Raises:
            ValueError: Every block is closed.
        """
        opened = {name: block for name, block in blocks(network, adapter_name).items() if is_open(block, adapter_name)}
        if not opened:
            raise ValueError(
                "no block of the Selective LoRA adapter is open, so there is nothing to save: the base itself is the "
                "result. Train with less sparsity, or a longer penalty_after, to keep some."
            )
        fields = (field.name for field in dataclasses.fields(LoraConfig) if field.init)
        settings = {name: getattr(self, name) for name in fields if name not in _PLACES}
        settings["target_modules"] = sorted(opened)
        settings["rank_pattern"] = {name: block.r[adapter_name] for name, block in opened.items()}
        settings["alpha_pattern"] = {name: block.lora_alpha[adapter_name] for name, block in opened.items()}
        kept = {}
        for key, value in state.items():
            place, part, _ = key.partition(".lora_")
            inside = place.removeprefix("base_model.model.")
            if not part or (inside in opened and ".lora_gate" not in key):
                kept[key] = value
        return LoraConfig(**settings), kept


class SelectiveLoraModel(LoraModel):
    """PEFT's LoRA tuner with a gate in every block.

    Args:
        model: The network.
        config: A `SelectiveLoraConfig`.
        adapter_name: Name of the adapter.
    """

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        add_gate(getattr(parent, target_name), adapter_name, lora_config, current_key)


def add_gate(layer: Any, adapter_name: str, config: SelectiveLoraConfig, name: str) -> None:
    """Puts a gate into a LoRA layer of PEFT.

    Raises:
        ValueError: It is no layer of A and B, or of another variant already.
    """
    plain = isinstance(layer, LoraLayer) and not isinstance(layer, (MultiheadAttention, ParamWrapper))
    if not plain or adapter_name not in layer.lora_A:
        kind = type(getattr(layer, "base_layer", layer)).__name__
        raise ValueError(f"Selective LoRA gates linear and convolutional layers, and {name} is a {kind}.")
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(f"Selective LoRA does not combine with another variant of LoRA ({variant} at {name}).")
    if not hasattr(layer, "lora_gate"):
        layer.lora_gate = nn.ParameterDict({})
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
    weight = layer.lora_A[adapter_name].weight
    # One element, not none: FSDP2 shards no scalars.
    gate = torch.full((1,), config.gate_init, dtype=weight.dtype, device=weight.device)
    layer.lora_gate[adapter_name] = nn.Parameter(gate, requires_grad=weight.requires_grad)
    layer.lora_variant[adapter_name] = Gated(config.threshold)


class Indicator(torch.autograd.Function):
    """1[s >= tau], whose gradient is passed straight through to s."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, threshold: float) -> Tensor:
        return (s >= threshold).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class Gated(LoraVariant):
    """The forward and the merging of a block with a gate; PEFT's layer calls them in its own's place.

    Args:
        threshold: tau.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def supports_lora_conversion(self) -> bool:
        return False

    def gate(self, module: Any, adapter_name: str) -> Tensor:
        """0 or 1, of shape [1]."""
        return Indicator.apply(module.lora_gate[adapter_name], self.threshold)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inner = lora_a(module.lora_dropout[active_adapter](x))
        # On the r numbers between A and B: the gradient of s then needs nothing that B's does not keep anyway.
        inner = inner * self.gate(module, active_adapter).to(inner.dtype)
        return result + lora_b(inner) * module.scaling[active_adapter]

    def delta(self, module: Any, active_adapter: str, weight: Tensor) -> Tensor:
        """What a merge adds to `weight`: 1[s >= tau] (alpha / r) B A."""
        gate = self.gate(module, active_adapter).detach()
        return (module.get_delta_weight(active_adapter) * gate.to(weight.device)).to(weight.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + self.delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += self.delta(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight - self.delta(module, active_adapter, orig_weight)


def blocks(network: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The gated blocks by their names in the network, without PEFT's own prefix."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in network.named_modules()
        if adapter_name in getattr(layer, "lora_gate", ())
    }


def is_open(block: Any, adapter_name: str) -> bool:
    """Whether a block acts. Reads its gate: not for the inside of a training step."""
    return bool(block.lora_variant[adapter_name].gate(block, adapter_name))


register_with_peft()
