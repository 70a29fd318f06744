"""Every form of bottleneck adapter against its formula, and MAM against its two parts."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from lightning_peft.adapters.bottleneck import BottleneckConfig
from lightning_peft.callbacks.delta_checkpoint import DeltaCheckpoint
from lightning_peft.callbacks.peft import PEFT
from lightning_peft.delta import load_delta
from lightning_peft.export import export
from tests.adapted import Classifier, Foreign, fit, logits
from tests.adapters.networks import FAMILIES, IDS, adapted, answer, base, check_round_trips, filled, trained
from tests.tiny import tiny_bert, tiny_llama

FORMS = {
    "parallel": {},
    "learned": {"scale": "learned", "activation": "gelu"},
    "behind-norm": {"parallel_input": "sublayer", "layer_norm": "in"},
    "norm-out": {"layer_norm": "out", "dropout": 0.1},
    "attention": {"position": "attention"},
    "multi-head": {"position": "attention", "multi_head": True},
    "both": {"position": "both"},
    "houlsby": {"form": "sequential", "position": "both", "scale": 1.0},
    "pfeiffer": {"form": "sequential", "insertion": "after", "scale": 1.0},
}
MAM = (
    {"peft_type": "BOTTLENECK", "bottleneck": 4, "scale": 4.0},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_round_trips(family, form, tmp_path):
    check_round_trips(family, BottleneckConfig(bottleneck=4, **FORMS[form]), tmp_path)


# -- formulas ---------------------------------------------------------------------------------------------------------


def bottleneck(adapter, x, scale):
    """s f(x W_down) W_up, written out."""
    down, up = adapter.down, adapter.up
    return scale * (F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def adapter_of(network, part):
    """The adapter at a module of the network."""
    return network.get_submodule(part).bottleneck_adapters["default"]


def patched(module, forward):
    module.forward = forward
    return module


def test_parallel_reads_the_residual_stream_before_the_norm():
    """h + mlp(norm(h)) + 4 f(h W_down) W_up, as in the authors' mBART, which is pre-norm too."""
    network = filled(adapted("llama", BottleneckConfig(bottleneck=4)))
    plain = base("llama")
    for i, layer in enumerate(plain.model.layers):
        adapter = adapter_of(network, f"base_model.model.model.layers.{i}.mlp")
        state = {}

        def norm(h, own=layer.post_attention_layernorm.forward, state=state):
            state["h"] = h
            return own(h)

        def mlp(x, own=layer.mlp.forward, adapter=adapter, state=state):
            return own(x) + bottleneck(adapter, state["h"], 4.0)

        layer.post_attention_layernorm.forward, layer.mlp.forward = norm, mlp
    torch.testing.assert_close(answer(network, "llama"), answer(plain, "llama"), rtol=0, atol=1e-5)


def test_parallel_behind_the_norm():
    network = filled(adapted("llama", BottleneckConfig(bottleneck=4, parallel_input="sublayer", scale=2.0)))
    plain = base("llama")
    for i, layer in enumerate(plain.model.layers):
        adapter = adapter_of(network, f"base_model.model.model.layers.{i}.mlp")
        layer.mlp.forward = lambda x, own=layer.mlp.forward, adapter=adapter: own(x) + bottleneck(adapter, x, 2.0)
    torch.testing.assert_close(answer(network, "llama"), answer(plain, "llama"), rtol=0, atol=1e-5)


def bert_outputs(network, rule, part):
    """A plain BERT whose `output` modules follow a rule: (module, hidden, x, adapter) -> result."""
    plain = base("bert")
    for i, layer in enumerate(plain.bert.encoder.layer):
        prefix = f"base_model.model.bert.encoder.layer.{i}"
        places = {"output": layer.output, "attention.output": layer.attention.output}
        for name, module in places.items():
            try:
                adapter = adapter_of(network, f"{prefix}.{name}.{part}")
            except AttributeError:
                continue
            module.forward = lambda hidden, x, module=module, adapter=adapter: rule(module, hidden, x, adapter)
    return plain


def test_houlsby_on_bert_is_the_adapters_librarys_formula():
    """h = dropout(dense(.)); LN(h + up(f(down(h))) + x), at attention and feed-forward part (`DoubleSeqBnConfig`)."""

    def rule(module, hidden, x, adapter):
        h = module.dropout(module.dense(hidden))
        return module.LayerNorm(h + bottleneck(adapter, h, 1.0) + x)

    network = filled(adapted("bert", BottleneckConfig(bottleneck=4, **FORMS["houlsby"])))
    plain = bert_outputs(network, rule, "dropout")
    torch.testing.assert_close(answer(network, "bert"), answer(plain, "bert"), rtol=0, atol=1e-5)


def test_pfeiffer_on_bert_is_the_adapters_librarys_formula():
    """r = h; u = LN(h + x); LN(up(f(down(u))) + r + x): its `SeqBnConfig` (original_ln_before and _after)."""

    def rule(module, hidden, x, adapter):
        h = module.dropout(module.dense(hidden))
        u = module.LayerNorm(h + x)
        return module.LayerNorm(bottleneck(adapter, u, 1.0) + h + x)

    network = filled(adapted("bert", BottleneckConfig(bottleneck=4, **FORMS["pfeiffer"])))
    plain = bert_outputs(network, rule, "LayerNorm")
    torch.testing.assert_close(answer(network, "bert"), answer(plain, "bert"), rtol=0, atol=1e-5)


def test_parallel_on_bert():
    """LN(h + 4 f(x W_down) W_up + x), x what the feed-forward part reads: the library's `ParBnConfig`."""

    def rule(module, hidden, x, adapter):
        return module.LayerNorm(module.dropout(module.dense(hidden)) + bottleneck(adapter, x, 4.0) + x)

    network = filled(adapted("bert", BottleneckConfig(bottleneck=4)))
    plain = bert_outputs(network, rule, "dropout")
    torch.testing.assert_close(answer(network, "bert"), answer(plain, "bert"), rtol=0, atol=1e-5)


def test_sequential_acts_after_the_dropout():
    network = adapted("bert", BottleneckConfig(bottleneck=4, **FORMS["houlsby"]))
    layer = network.base_model.model.bert.encoder.layer[0]
    assert isinstance(layer.output.dropout.base_layer, nn.Dropout)
    assert isinstance(layer.attention.output.dropout.base_layer, nn.Dropout)


@pytest.mark.parametrize("heads", [False, True])
def test_parallel_on_attention_adds_to_the_heads_before_the_projection(heads):
    """o_proj(heads + 4 f(x W_down) W_up); in the multi-head form x is each head's query, with weights of its own."""
    network = filled(adapted("llama", BottleneckConfig(bottleneck=3, position="attention", multi_head=heads)))
    plain = base("llama")
    for i, layer in enumerate(plain.model.layers):
        adapter = adapter_of(network, f"base_model.model.model.layers.{i}.self_attn.o_proj")
        attention, state = layer.self_attn, {}

        def keep(module, args, kwargs, state=state):
            state["x"] = kwargs["hidden_states"] if not args else args[0]

        attention.register_forward_pre_hook(keep, with_kwargs=True)

        def o_proj(z, own=attention.o_proj.forward, adapter=adapter, attention=attention, state=state):
            if not heads:
                return own(z + bottleneck(adapter, state["x"], 4.0))
            query = attention.q_proj(state["x"])
            changes = []
            for j in range(4):
                q = query[..., 8 * j : 8 * j + 8]
                changes.append(4.0 * F.relu(q @ adapter.down[j]) @ adapter.up[j])
            return own(z + torch.cat(changes, -1))

        attention.o_proj.forward = o_proj
    torch.testing.assert_close(answer(network, "llama"), answer(plain, "llama"), rtol=0, atol=1e-5)


def test_multi_head_has_as_many_weights_as_a_prefix_of_the_same_length():
    network = adapted("llama", BottleneckConfig(bottleneck=3, position="attention", multi_head=True))
    assert (
        sum(p.numel() for p in trained(network).values()) == 2 * 2 * 3 * 32
    )  # layers x (keys, values) x length x width


def test_queries_of_a_fused_projection():
    """GPT-2's c_attn has the queries first."""
    network = filled(adapted("gpt2", BottleneckConfig(bottleneck=3, position="attention", multi_head=True)))
    layer = network.base_model.model.transformer.h[0].attn
    seen = {}
    layer.c_attn.register_forward_hook(lambda module, args, out: seen.update(query=out[..., :32]))
    layer.c_proj.register_forward_pre_hook(lambda module, args: seen.update(given=args[0]))
    layer.c_proj.base_layer.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    answer(network, "gpt2")
    adapter = layer.c_proj.bottleneck_adapters["default"]
    change = [4.0 * F.relu(seen["query"][..., 8 * j : 8 * j + 8] @ adapter.down[j]) @ adapter.up[j] for j in range(4)]
    torch.testing.assert_close(seen["z"], seen["given"] + torch.cat(change, -1), rtol=0, atol=1e-5)


def test_gradients_of_the_parallel_form_by_hand():
    """In float64, with a gradient that differs by token and by channel, and each weight alone."""
    torch.manual_seed(0)
    from lightning_peft.adapters.bottleneck import BottleneckAdapter, Place

    part = None
    place = Place("returns", "residual", 6, 5, 0, part)
    adapter = BottleneckAdapter(place, BottleneckConfig(bottleneck=3, scale="learned", activation="tanh")).double()
    filled(adapter)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    upstream = torch.randn(2, 4, 5, dtype=torch.float64)
    (adapter(x) * upstream).sum().backward()
    a = torch.tanh(x @ adapter.down.weight.T + adapter.down.bias)
    u = a @ adapter.up.weight.T + adapter.up.bias
    d_up = adapter.scale * upstream
    d_a = d_up @ adapter.up.weight * (1 - a * a)
    expected = {
        "scale": (upstream * u).sum()[None],
        "up.weight": torch.einsum("bto,btr->or", d_up, a),
        "up.bias": d_up.sum((0, 1)),
        "down.weight": torch.einsum("btr,btd->rd", d_a, x),
        "down.bias": d_a.sum((0, 1)),
    }
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


def test_starting_values():
    torch.manual_seed(0)
    lora = trained(adapted("llama", BottleneckConfig(bottleneck=64)))
    bert = trained(adapted("llama", BottleneckConfig(bottleneck=64, init="bert")))
    bound = 32**-0.5
    for name in lora:
        if name.endswith("down.weight"):
            assert lora[name].abs().max() <= bound
            assert float(lora[name].detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert not lora[name].any(), name
        if name.endswith("weight"):
            assert float(bert[name].detach().std()) == pytest.approx(0.02, rel=0.1)


def test_only_the_blocks_that_are_named():
    network = adapted("llama", BottleneckConfig(bottleneck=4, layers_to_transform=[1]))
    assert all(".layers.1." in name for name in trained(network))
    both = adapted("t5", BottleneckConfig(bottleneck=4, layers_to_transform=[0]))
    assert {name.split(".")[2] for name in trained(both)} == {"encoder", "decoder"}
    assert all(".block.0." in name for name in trained(both))


def test_two_adapters_of_different_forms_act_together():
    network = adapted("llama", BottleneckConfig(bottleneck=4))
    network.add_adapter("second", BottleneckConfig(bottleneck=3, form="sequential"))
    network.base_model.set_adapter(["default", "second"])
    filled(network)
    layer = network.base_model.model.model.layers[0].mlp
    first, second = layer.bottleneck_adapters["default"], layer.bottleneck_adapters["second"]
    seen = {}
    network.base_model.model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: seen.update(h=args[0])
    )
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.update(out=out))
    layer.register_forward_hook(lambda module, args, out: seen.update(result=out))
    answer(network, "llama")
    h = seen["out"] + bottleneck(first, seen["h"], 4.0)
    torch.testing.assert_close(seen["result"], h + bottleneck(second, h, 4.0), rtol=0, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        network = filled(adapted("llama", BottleneckConfig(bottleneck=4, position="both"))).train()
        if recompute:
            network.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            network.base_model.model.enable_input_require_grads()
        out = network(input_ids=IDS, use_cache=False)[0]
        (out * torch.arange(out.shape[-1])).sum().backward()
        gradients.append({name: p.grad for name, p in trained(network).items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-5)


# -- bases ------------------------------------------------------------------------------------------------------------


def test_on_a_base_in_four_bits():
    pytest.importorskip("bitsandbytes")
    module = Foreign()
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    PEFT({"peft_type": "BOTTLENECK", "bottleneck": 4, "position": "both"}, quantization_config=nf4).attach(module)
    before = {name: p.detach().clone() for name, p in trained(module).items()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    fit(module, [], steps=2)
    assert any(not torch.equal(before[name], p) for name, p in trained(module).items())


def test_on_a_bf16_base_the_adapter_is_fp32_and_the_stream_stays_bf16():
    module = Foreign()
    module.net.to(torch.bfloat16)
    PEFT({"peft_type": "BOTTLENECK", "bottleneck": 4}).attach(module)
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert logits(filled(module).net).dtype == torch.bfloat16


# -- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [ModelCheckpoint, DeltaCheckpoint])
def test_checkpoint_and_export(checkpoint, tmp_path):
    """A classifier with its head, from Lightning's checkpoint and from a delta, into a folder that plain PEFT loads."""
    config = {"peft_type": "BOTTLENECK", "bottleneck": 4, "form": "sequential"}
    torch.manual_seed(0)
    module = Classifier()
    tiny_bert().save_pretrained(tmp_path / "base")
    saving = checkpoint(tmp_path, filename="end", every_n_train_steps=2)
    fit(module, [PEFT(config), saving], steps=2, path=tmp_path)
    expected = logits(module.net)

    fresh = Classifier()
    PEFT(config).attach(fresh)
    load_delta(fresh, tmp_path / "end.ckpt")
    assert torch.equal(logits(fresh.net), expected)

    export(str(tmp_path / "end.ckpt"), str(tmp_path / "out"), base=str(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        export(module, str(tmp_path / "merged"), merge=True)


# -- MAM --------------------------------------------------------------------------------------------------------------


def mam(order=(0, 1)):
    module = Foreign()
    for i in order:
        PEFT(MAM[i], adapter_name=("adapter", "virtual")[i]).attach(module)
    return module


def split(module):
    """The trained values of the two parts."""
    values = trained(module)
    return (
        {n: p.detach() for n, p in values.items() if "bottleneck_" in n},
        {n: p.detach() for n, p in values.items() if "prompt_encoder" in n},
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_mam_is_prefix_tuning_and_the_parallel_adapter(order):
    """PEFT's own prefix model around a network whose feed-forward parts follow the formula by hand."""
    module = filled(mam(order))
    adapters, prefix = split(module)
    assert adapters
    assert prefix
    plain = base("llama")
    for i, layer in enumerate(plain.model.layers):
        adapter = module.net.base_model.model.layers[i].mlp.bottleneck_adapters["adapter"]
        state = {}

        def norm(h, own=layer.post_attention_layernorm.forward, state=state):
            state["h"] = h
            return own(h)

        def mlp(x, own=layer.mlp.forward, adapter=adapter, state=state):
            return own(x) + bottleneck(adapter, state["h"], 4.0)

        layer.post_attention_layernorm.forward, layer.mlp.forward = norm, mlp
    given = {k: v for k, v in MAM[1].items() if k != "peft_type"}
    theirs = peft.get_peft_model(plain, peft.PrefixTuningConfig(task_type="CAUSAL_LM", **given), "virtual")
    theirs.prompt_encoder.load_state_dict(module.net.prompt_encoder.state_dict())
    torch.testing.assert_close(logits(module.net), logits(theirs), rtol=0, atol=1e-5)


def test_mam_with_one_part_at_its_start_is_the_other():
    """The adapter starts at zero: the rest is PEFT's prefix tuning to the bit."""
    module = mam()
    prefix = Foreign()
    PEFT(MAM[1], adapter_name="virtual").attach(prefix)
    prefix.net.prompt_encoder.load_state_dict(module.net.prompt_encoder.state_dict())
    assert torch.equal(logits(module.net), logits(prefix.net))


def test_mam_trains_both_parts_and_its_checkpoint_loads(tmp_path):
    module = Foreign()
    callbacks = [PEFT(MAM[0], adapter_name="adapter"), PEFT(MAM[1], adapter_name="virtual")]
    before = None
    for callback in callbacks:
        callback.attach(module)
    before = [{name: p.clone() for name, p in part.items()} for part in split(module)]
    trainer = fit(module, [*callbacks, DeltaCheckpoint(tmp_path, filename="end", every_n_train_steps=3)], steps=3)
    for part, old in zip(split(module), before):
        assert any(not torch.equal(part[name], value) for name, value in old.items())
    ended = logits(module.net)
    trainer.test(module, dataloaders=trainer.train_dataloader, verbose=False)
    assert torch.equal(logits(module.net), ended)
    fresh = mam()
    load_delta(fresh, tmp_path / "end.ckpt")
    assert torch.equal(logits(fresh.net), ended)


def test_mam_is_exported_as_two_folders(tmp_path):
    """Plain PEFT: the adapter into the network, then the prefix around it."""
    module = filled(mam())
    for name in ("adapter", "virtual"):
        export(module, str(tmp_path / name), adapter_name=name)
    inner = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).base_model.model
    loaded = PeftModel.from_pretrained(inner, str(tmp_path / "virtual"))
    torch.testing.assert_close(logits(loaded), logits(module.net), rtol=0, atol=1e-6)
    again = Foreign()
    PEFT(adapter=str(tmp_path / "adapter"), adapter_name="adapter").attach(again)
    PEFT(adapter=str(tmp_path / "virtual"), adapter_name="virtual").attach(again)
    torch.testing.assert_close(logits(again.net), logits(module.net), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        export(module, str(tmp_path / "merged"), merge=True)


def test_two_types_of_tuner_are_refused():
    module = Foreign()
    PEFT(MAM[0]).attach(module)
    with pytest.raises(ValueError, match="one PEFT type, and prompt learning besides"):
        PEFT({"peft_type": "LORA", "target_modules": ["q_proj"]}, adapter_name="lora").attach(module)


def test_two_adapters_on_a_classifier_share_its_head():
    module = Classifier()
    PEFT({"peft_type": "LORA", "r": 2, "target_modules": ["query"]}).attach(module)
    PEFT({"peft_type": "LORA", "r": 2, "target_modules": ["value"]}, adapter_name="other").attach(module)
    assert {n.split(".")[-2] for n in trained(module) if "classifier" in n} == {"default"}
    assert any("lora_B.other" in n for n in trained(module))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "serial"}, "form='serial' is not known"),
        ({"position": "mlp"}, "position='mlp' is not known"),
        ({"insertion": "behind"}, "insertion='behind' is not known"),
        ({"init": "zero"}, "init='zero' is not known"),
        ({"layer_norm": "both"}, "layer_norm='both' is not known"),
        ({"parallel_input": "norm"}, "parallel_input='norm' is not known"),
        ({"bottleneck": 0}, "bottleneck=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"scale": "big"}, "scale='big' must be a number or 'learned'"),
        ({"insertion": "after"}, "goes with form='sequential'"),
        ({"multi_head": True}, "goes with form='parallel', position='attention'"),
        ({"activation": "rely"}, "activation='rely' is not known; closest: .*relu"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**given)


def test_no_such_block():
    with pytest.raises(ValueError, match=r"no block of LlamaForCausalLM is at layers_to_transform=\[9\]"):
        adapted("llama", BottleneckConfig(layers_to_transform=9))


def test_not_a_transformer():
    with pytest.raises(ValueError, match="has no transformer blocks"):
        peft.inject_adapter_in_model(BottleneckConfig(), nn.Sequential(nn.Linear(3, 3)))


def test_an_adapter_inside_another_ones_module_is_refused():
    network = adapted("llama", BottleneckConfig(bottleneck=4, **FORMS["pfeiffer"]))
    with pytest.raises(ValueError, match="add the adapter that sits further out last"):
        network.add_adapter("second", BottleneckConfig(bottleneck=4))


def test_a_part_called_out_of_its_block_says_so():
    network = adapted("bert", BottleneckConfig(bottleneck=4))
    output = copy.copy(network.base_model.model.bert.encoder.layer[0].output)
    with pytest.raises(RuntimeError, match="call the block as a whole"):
        output(torch.zeros(1, 2, 64), torch.zeros(1, 2, 32))
