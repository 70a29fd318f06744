"""Adapters folded into their layers, one layer at a time, the live network left alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

#: How far a merged layer's output may be from the adapter's, relative to its largest entry: rounding of the weights.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def refuse_merging(network: nn.Module) -> None:
    """Raises if folding the adapters into the base would change the network's answers.

    Raises:
        ValueError: The base is quantised, or the method is not a change of weights; the message says what to do.
    """
    from lightning_peft.adapters.injection import configs_of, tuner_of
    from lightning_peft.quantization import is_quantized

    if is_quantized(network):
        raise ValueError(
            "merging into a 4- or 8-bit base rounds the adapter away and changes answers: export the adapter alone "
            "(merge=False), or merge a checkpoint into the unquantised base with export(checkpoint, out, merge=True, "
            "base=FOLDER_OR_HUB_NAME)."
        )
    for name, config in configs_of(network).items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"adapter {name!r} ({config.peft_type.value}) adds tokens, not weights, so it cannot be merged: export "
                "the adapter alone (merge=False)."
            )
    check = getattr(tuner_of(network), "_check_merge_allowed", None)
    if check is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights: what comes out untied is written untied
            try:
                check()
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"PEFT cannot merge this adapter: {error}") from error


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain network with its adapters folded in, under the base's own names.

    Args:
        network: A network with adapters, or its `PeftModel`; unchanged.

    Raises:
        ValueError: Some method cannot be merged exactly.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from lightning_peft.network_record import base_of

    refuse_merging(network)
    plain: dict[str, Tensor] = {}
    done: list[str] = []
    base = base_of(network)
    for name, part in base.named_modules():
        if any(name.startswith(f"{other}.") for other in done):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            done.append(name)
            layer = _merged_layer(name, part)
            plain.update({f"{prefix}{key}": value for key, value in layer.state_dict().items()})
        else:
            own: dict[str, Any] = {}
            part._save_to_state_dict(own, prefix, keep_vars=False)
            plain.update(own)
    return plain


def _merged_layer(name: str, part: Any) -> nn.Module:
    copied = copy.deepcopy(part).eval()
    try:
        if hasattr(copied, "unload_and_optionally_merge_module"):
            layer = copied.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            copied.merge(safe_merge=True)
            layer = copied.get_base_layer()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{type(part).__name__} at {name} cannot be merged ({error}): export the adapter alone (merge=False)."
        ) from error
    _check_same(name, part, layer)
    return layer


@torch.no_grad()
def _check_same(name: str, part: nn.Module, merged: nn.Module) -> None:
    """The merged layer and the adapted one on the same random input."""
    weight = getattr(merged, "weight", None)
    if weight is None or weight.ndim != 2:
        return
    generator = torch.Generator().manual_seed(0)
    if isinstance(merged, nn.Embedding):
        given = torch.randint(0, len(weight), (64,), generator=generator)
    else:
        width = weight.shape[0] if type(merged).__name__ == "Conv1D" else weight.shape[1]
        given = torch.randn(8, width, generator=generator).to(weight.dtype)
    adapted = copy.deepcopy(part).eval()
    expected, got = (layer(given.to(weight.device)).float() for layer in (adapted, merged.eval()))
    tolerance = TOLERANCE.get(weight.dtype, 1e-4) * max(float(expected.abs().max()), 1e-6)
    difference = float((expected - got).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{type(part).__name__} at {name}: merged, its output is off by {difference:.2g} (rounding of "
            f"{weight.dtype} explains {tolerance:.2g}), so merging is not exact: export the adapter alone."
        )
