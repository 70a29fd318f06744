"""Connected adapters: the path by hand, and a gradient that reaches its beginning without the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft.adapters.connected import ConnectedAdapterConfig
from lightning_peft.callbacks.peft import PEFT
from tests.adapted import Foreign, fit, logits
from tests.adapters.networks import FAMILIES, IDS, adapted, answer, base, check_round_trips, filled, trained

FORMS = {"layers": {}, "head": {"feeds": "head", "inside": 0}, "head-inside": {"feeds": "head"}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_round_trips(family, form, tmp_path):
    check_round_trips(family, ConnectedAdapterConfig(**{"bottleneck": 4, "inside": 3, **FORMS[form]}), tmp_path)


def block(adapter, x):
    """W_up f(W_down x)."""
    return F.gelu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias


@pytest.mark.parametrize("feeds", ["layers", "head"])
def test_the_path_by_hand(feeds):
    """a_l = block(h_l + s_(l-1)), s_l = s_(l-1) + a_l, h_l + a_l onwards (or not), h_L + s_L to the head."""
    network = filled(adapted("bert", ConnectedAdapterConfig(bottleneck=4, inside=0, feeds=feeds)))
    asides = [layer.connected_aside["default"] for layer in network.base_model.model.bert.encoder.layer]
    plain, state = base("bert"), {}

    def follow(module, args, h, i):
        change = block(asides[i], h + (state["s"] if i else 0))
        state["s"] = change + (state["s"] if i else 0)
        if i == len(asides) - 1:
            return h + state["s"]
        return h + change if feeds == "layers" else h

    for i, layer in enumerate(plain.bert.encoder.layer):
        layer.register_forward_hook(lambda m, a, h, i=i: follow(m, a, h, i))
    torch.testing.assert_close(answer(network, "bert"), answer(plain, "bert"), rtol=0, atol=1e-5)


def test_the_inside_is_the_sequential_adapter():
    from lightning_peft.adapters.bottleneck import BottleneckConfig

    ours = filled(adapted("llama", ConnectedAdapterConfig(bottleneck=2, inside=4)))
    theirs = adapted("llama", BottleneckConfig(form="sequential", scale=1.0, activation="gelu", bottleneck=4))
    values = {n.replace("connected_inside", "bottleneck_adapters"): p for n, p in ours.named_parameters()}
    values = {n.replace("base_layer.mlp", "mlp"): p for n, p in values.items()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
        for name, parameter in ours.named_parameters():
            if "connected_aside" in name and ".up." in name:
                parameter.zero_()
    torch.testing.assert_close(answer(ours, "llama"), answer(theirs, "llama"), rtol=0, atol=1e-6)


class Detached(nn.Module):
    """A block whose output has no gradient: what the path does without the network."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, *args, **kwargs):
        return self.own(*args, **kwargs).detach()


def first_gradient(config, depth=6, detach=True):
    """Gradient of the first trained block of a deep network, its own blocks detached."""
    from peft import inject_adapter_in_model

    from tests.tiny import tiny_llama

    network = filled(inject_adapter_in_model(config, tiny_llama(layers=depth).eval()), std=0.1)
    if detach:
        for layer in network.model.layers:
            layer.base_layer = Detached(layer.base_layer)
    (network(input_ids=IDS, use_cache=False)[0] * torch.linspace(-1, 1, 128)).sum().backward()
    return [p.grad for n, p in network.named_parameters() if ".layers.0.connected_aside" in n]


@pytest.mark.parametrize("feeds", ["layers", "head"])
def test_gradient_reaches_the_first_block_beside_a_detached_network(feeds, capsys):
    """The paper's point. Scattered adapters get nothing once the layers after them pass no gradient."""
    config = ConnectedAdapterConfig(bottleneck=4, inside=0, feeds=feeds)
    along = torch.cat([g.flatten() for g in first_gradient(config)]).norm()
    through = torch.cat([g.flatten() for g in first_gradient(config, detach=False)]).norm()
    print(
        f"norm of the first block's gradient, feeds={feeds}: {along:.3g} along the path, {through:.3g} with the network"
    )
    assert along > 0.01 * through


def test_scattered_adapters_get_no_gradient_beside_a_detached_network():
    from peft import inject_adapter_in_model

    from lightning_peft.adapters.bottleneck import BottleneckConfig
    from tests.tiny import tiny_llama

    config = BottleneckConfig(bottleneck=4, form="sequential", insertion="after")
    network = filled(inject_adapter_in_model(config, tiny_llama(layers=3).eval()))
    for layer in network.model.layers:
        layer.base_layer = Detached(layer.base_layer)
    network(input_ids=IDS, use_cache=False)[0].sum().backward()
    first = [p.grad for n, p in network.named_parameters() if ".layers.0.bottleneck" in n]
    assert all(g is None or not g.any() for g in first)


def test_two_stacks_have_a_path_each():
    network = filled(adapted("t5", ConnectedAdapterConfig(bottleneck=4, inside=0)))
    layers = [m for m in network.modules() if type(m).__name__ == "ConnectedLayer"]
    assert len({id(layer.paths["default"]) for layer in layers}) == 2
    assert [(p.first, p.last) for p in (layer.places["default"] for layer in layers)] == [
        (True, False),
        (False, True),
    ] * 2


def test_only_the_blocks_that_are_named():
    network = adapted("llama", ConnectedAdapterConfig(bottleneck=4, layers_to_transform=[1]))
    assert all(".layers.1." in name for name in trained(network))
    answer(filled(network), "llama")


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        network = filled(adapted("bert", ConnectedAdapterConfig(bottleneck=4, inside=3))).train()
        if recompute:
            network.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        (answer(network, "bert").pow(2)).sum().backward()
        gradients.append({name: p.grad for name, p in trained(network).items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-6)


def test_on_a_base_in_four_bits():
    pytest.importorskip("bitsandbytes")
    module = Foreign(hidden=64)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    callback = PEFT({"peft_type": "CONNECTED", "bottleneck": 4, "inside": 3}, quantization_config=nf4)
    before = logits(module.net)
    fit(module, [callback], steps=2)
    assert not torch.equal(before, logits(module.net))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feeds": "all"}, "feeds='all' is not known"),
        ({"inside": -1}, "inside=-1 must be at least 0"),
        ({"bottleneck": 0}, "bottleneck=0 must be at least 1"),
        ({"activation": "gelo"}, "activation='gelo' is not known"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        ConnectedAdapterConfig(**given)


def test_a_layer_alone_says_so():
    network = adapted("bert", ConnectedAdapterConfig(bottleneck=4))
    with pytest.raises(RuntimeError, match="ran without the one in the layer before it"):
        network.base_model.model.bert.encoder.layer[1](torch.zeros(1, 3, 32))
