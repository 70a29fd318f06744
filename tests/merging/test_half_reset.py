"""Half-reset, and the roles it reads from names and shapes alone."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.half import choose_half
from lightning_peft.merging import half_reset
from lightning_peft.merging.half_reset import skeleton
from lightning_peft.roles import weights_by_role
from tests.merging.folders import save_models, tuned
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama


def families():
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    yield tiny_llama(layers=12)
    yield tiny_llama(attention_bias=True)
    yield tiny_gpt2()
    yield tiny_bert()
    yield T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    yield ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    )
    yield MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("network", families(), ids=lambda network: type(network).__name__)
def test_names_and_shapes_tell_the_same_roles_as_the_network(network):
    def told(weights):
        return {w.name: (w.role, w.block, w.index, w.is_bias) for w in weights if w.block is not None}

    found = skeleton({name: tensor.shape for name, tensor in network.state_dict().items()})
    assert told(weights_by_role(found)) == told(weights_by_role(network))


@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
@pytest.mark.parametrize("network", [tiny_llama, tiny_gpt2, tiny_bert])
def test_resets_the_chosen_half_and_nothing_else(network, granularity):
    base, fine = network(), tuned(network(), 1)
    start, end = base.state_dict(), fine.state_dict()
    chosen = choose_half(weights_by_role(fine), 0.5, 3, 0, granularity)
    result = half_reset(start, end, seed=3, granularity=granularity)
    assert list(result) == list(end)
    for name, tensor in result.items():
        assert torch.equal(tensor, start[name] if name in chosen else end[name]), name
    assert any(not torch.equal(result[name], end[name]) for name in chosen)
    again = half_reset(base, fine, seed=3, granularity=granularity)  # networks instead of state dicts
    assert all(torch.equal(again[name], result[name]) for name in result)


def test_a_model_tuned_from_itself_stays():
    state = tiny_llama().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in half_reset(state, dict(state)).items())


def test_folders(tmp_path):
    base, fine = save_models(tmp_path, 1)
    result = half_reset(base, fine, fraction=0.25)
    memory = half_reset(tiny_llama(), tuned(tiny_llama(), 1), fraction=0.25)
    assert result.keys() == memory.keys()
    assert all(torch.equal(result[name], memory[name]) for name in result)


def test_dtype_and_storage_are_the_tuned_model_s_own():
    base, fine = tiny_llama(), tuned(tiny_llama().to(torch.bfloat16), 1)
    result = half_reset(base, fine)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    name = next(iter(choose_half(weights_by_role(fine))))
    result[name].zero_()
    assert base.state_dict()[name].any()


def test_refuses_another_base_and_wrong_arguments():
    fine = tiny_llama()
    with pytest.raises(ValueError, match=r"the base lacks .*fine-tuned from"):
        half_reset(tiny_gpt2(), fine)
    with pytest.raises(ValueError, match="another shape"):
        half_reset(tiny_llama(hidden=64), fine)
    with pytest.raises(ValueError, match="fraction=1"):
        half_reset(fine, fine, fraction=1)
    with pytest.raises(ValueError, match="no transformer blocks"):
        half_reset({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)})
