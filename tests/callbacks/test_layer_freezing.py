"""Freezing by role: what each name means in five families, ties, refusals."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_peft.callbacks import PEFT, LayerFreezing
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.roles import has_tied_head
from tests.callbacks.test_half_finetuning import causal, copied, fit, trained
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit


def named(network: torch.nn.Module, *train: str) -> set[str]:
    """What LayerFreezing leaves trainable in a network, by the network's own names."""
    module = CausalLM(network) if hasattr(network, "lm_head") else SequenceClassifier(network)
    callback = LayerFreezing(list(train))
    callback._module = module
    callback._begin(module)
    names = {name.removeprefix("model.") for name, p in module.named_parameters() if p.requires_grad}
    callback._release()
    return names


def matching(network: torch.nn.Module, pattern: str) -> set[str]:
    found = {name for name, _ in network.named_parameters() if re.search(pattern, name)}
    assert found
    return found


#: network, what is named, what that is there.
MEANINGS = {
    "llama embeddings and head": (tiny_llama, ("embeddings", "head"), r"embed_tokens|lm_head"),
    "llama head": (tiny_llama, ("head",), r"lm_head"),
    "llama last block": (tiny_llama, ("last_block",), r"layers\.1\."),
    "llama from the end": (tiny_llama, ("block:-2",), r"layers\.0\."),
    "llama attention and norms": (tiny_llama, ("attention", "norms"), r"self_attn|norm"),
    "llama down": (tiny_llama, ("ffn.down",), r"down_proj"),
    "llama by module": (tiny_llama, ("layers.1.mlp",), r"layers\.1\.mlp"),
    "gpt2 embeddings and head": (tiny_gpt2, ("embeddings", "head"), r"wte|wpe"),
    "gpt2 last block": (tiny_gpt2, ("last_block",), r"h\.1\."),
    "gpt2 biases": (tiny_gpt2, ("biases",), r"bias$"),
    "bert embeddings": (tiny_bert, ("embeddings",), r"_embeddings"),
    "bert head": (tiny_bert, ("head",), r"classifier"),
    "bert last block and head": (tiny_bert, ("last_block", "head"), r"layer\.1\.|classifier"),
    "t5 embeddings and head": (tiny_t5, ("embeddings", "head"), r"^shared|relative_attention_bias"),
    "t5 last block": (tiny_t5, ("last_block",), r"^decoder\.block\.1\."),
    "t5 encoder": (tiny_t5, ("encoder.block:0",), r"^encoder\.block\.0\."),
    "vit embeddings": (tiny_vit, ("embeddings",), r"embeddings"),
    "vit head": (tiny_vit, ("head",), r"^classifier"),
    "vit last block": (tiny_vit, ("block:1",), r"layers?\.1\."),
    "mixtral experts": (tiny_mixtral, ("experts",), r"experts"),
    "mixtral router": (tiny_mixtral, ("router",), r"gate\.weight|router"),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_names_mean_the_same_in_every_family(case):
    make, train, pattern = MEANINGS[case]
    network = make()
    expected = matching(network, pattern)
    if "t5 embeddings" in case:  # position tables are the attention's; what they count as is the role table's matter
        assert {"shared.weight"} <= named(network, *train) <= expected
    else:
        assert named(network, *train) == expected


def test_only_what_is_named_moves_and_has_optimizer_state():
    module = causal(tiny_llama())
    before = copied(module)
    trainer = fit(module, LayerFreezing(["last_block"]))
    assert trained(module, before) == {name for name in before if ".layers.1." in name}
    held = {id(p) for p in trainer.optimizers[0].state}
    assert held == {id(p) for name, p in module.named_parameters() if ".layers.1." in name}


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_llama(tie=True), tiny_t5])
def test_a_tied_head_trains_with_the_embedding_or_not_at_all(make):
    assert has_tied_head(make())
    for one, other in (("head", "embeddings"), ("embeddings", "head")):
        with pytest.raises(ValueError, match=rf"\(tied\).*add '{other}'"):
            named(make(), one)
    assert any(re.search(r"wte|embed_tokens|shared", name) for name in named(make(), "embeddings", "head"))


def test_an_untied_head_is_no_embedding():
    assert not has_tied_head(tiny_llama())
    assert not has_tied_head(tiny_bert())
    assert not has_tied_head(torch.nn.Linear(2, 2))


def test_what_stands_beside_the_network_keeps_its_flag():
    class Own(CausalLM):
        def __init__(self) -> None:
            super().__init__(tiny_llama())
            self.extra = torch.nn.Linear(2, 2)

    module = Own()
    callback = LayerFreezing(["last_block"])
    callback._module = module
    callback._begin(module)
    assert module.extra.weight.requires_grad
    callback._release()


def test_adapters_are_pefts_to_train():
    module = causal(tiny_llama())
    before = copied(module)
    adapter = PEFT({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    fit(module, LayerFreezing(["norms"]), callbacks=[adapter, LayerFreezing(["norms"])])
    moved = {
        name for name, value in module.state_dict().items() if name in before and not torch.equal(before[name], value)
    }
    assert moved == {name for name in before if "norm" in name}
    assert any(p.requires_grad and "lora_" in name for name, p in module.named_parameters())


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["attn"], r"'attn', which nothing in this network is.*attention.*block:0 to 1"),
        (["block:2"], r"'block:2'.*block:0 to 1"),
        (["block:-3"], r"'block:-3'"),
        (["router"], r"'router', which nothing in this network is"),
        (["layers.7"], r"did you mean"),
    ],
)
def test_a_name_that_means_nothing_is_told_with_what_there_is(train, message):
    with pytest.raises(ValueError, match=message):
        named(tiny_llama(), *train)


@pytest.mark.parametrize("train", [[], "head"])
def test_a_list_is_asked_for(train):
    with pytest.raises(ValueError, match="must be a list"):
        LayerFreezing(train)


def test_picture(tmp_path):
    fit(causal(tiny_llama()), LayerFreezing(["last_block"], picture=True), default_root_dir=tmp_path)
    assert (tmp_path / "layerfreezing.png").stat().st_size > 1000
