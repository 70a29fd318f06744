"""A network in another mode for a while, and afterwards as it was: evaluation, and without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """The network without its adapters. Nothing else changes: PEFT's own switch would reset `requires_grad`."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in network.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    prompts = isinstance(network, PeftModel) and network.peft_config[network.active_adapter].is_prompt_learning
    try:
        with network.disable_adapter() if prompts else nullcontext():
            yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value
