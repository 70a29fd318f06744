"""The five families that adapters beside a network are tried on, frozen and in eval mode, and their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.tiny import HIDDEN, VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

IDS = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def tiny_t5() -> nn.Module:
    """A T5 with two layers in each stack."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_ff=2 * HIDDEN, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        return T5ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llama": (tiny_llama, {"input_ids": IDS}),
    "gpt2": (tiny_gpt2, {"input_ids": IDS}),
    "bert": (tiny_bert, {"input_ids": IDS}),
    "t5": (tiny_t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit": (tiny_vit, {"pixel_values": PIXELS}),
}
TEXT = [name for name in FAMILIES if name != "vit"]


def base(family: str) -> Any:
    """A fresh network of a family, always the same, that does not train."""
    return FAMILIES[family][0]().eval().requires_grad_(False)


def adapted(family: str, config: PeftConfig, adapter_name: str = "default") -> Any:
    """The same with an adapter, by plain PEFT."""
    return get_peft_model(base(family), copy.deepcopy(config), adapter_name=adapter_name).eval()


def answer(network: nn.Module, family: str, **further: Any) -> Tensor:
    """What it makes of the family's inputs."""
    return network(**FAMILIES[family][1], **further)[0]


def filled(network: nn.Module, std: float = 0.3, seed: int = 1) -> Any:
    """The network with random numbers in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def check_round_trips(family: str, config: PeftConfig, tmp_path: Path) -> None:
    """Plain PEFT: a start that changes nothing, gradients, disk, a second name, off and on, copies, unload."""
    plain = base(family)
    if type(config).__name__ == "SparseGINConfig":
        plain.set_attn_implementation("eager")
    with torch.no_grad():
        expected = answer(plain, family)
    network = adapted(family, config)
    with torch.no_grad():
        assert torch.equal(answer(network, family), expected), "an adapter that has learnt nothing changes nothing"
    filled(network)
    out = answer(network, family)
    assert not torch.equal(out, expected)
    (out * torch.arange(out.shape[-1])).sum().backward()
    assert not [name for name, p in trained(network).items() if p.grad is None or not p.grad.any()]

    network.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), str(tmp_path), adapter_name="another").eval()
    assert torch.equal(answer(loaded, family), out)
    with network.disable_adapter():
        assert torch.equal(answer(network, family), expected)
    assert torch.equal(answer(copy.deepcopy(network), family), out)
    check_not_merged(network)
    unloaded = network.unload()
    assert torch.equal(answer(unloaded, family), expected)
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())


def check_not_merged(network: Any) -> None:
    """Merging is refused with a reason and a way out."""
    for merge in (network.merge_and_unload, network.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*keep it as an adapter"):
            merge()
