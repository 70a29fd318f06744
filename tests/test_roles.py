"""What each weight is for, written out by hand for each family, and the same through every wrapping."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_peft.models import CausalLM
from lightning_peft.objectives import ConceptAwareCausalLM
from lightning_peft.parts import Part, PartLeaf
from lightning_peft.roles import ROLES, final_norm, inner_model, transformer_blocks, weights_by_role
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit

#: Family -> network, what is outside of blocks, stack -> where its blocks are and what one holds (biases aside).
LLAMA_ATTENTION = {f"self_attn.{part}_proj.weight": f"attention.{part}" for part in "qkvo"}
LLAMA_NORMS = {"input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm"}
T5_SELF = {f"layer.0.SelfAttention.{part}.weight": f"attention.{part}" for part in "qkvo"}
T5_CROSS = {f"layer.1.EncDecAttention.{part}.weight": f"attention.{part}" for part in "qkvo"}
FAMILIES = {
    "llama": (
        tiny_llama,
        {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"},
        {
            "decoder": (
                "model.layers",
                {
                    **LLAMA_ATTENTION,
                    **LLAMA_NORMS,
                    "mlp.gate_proj.weight": "ffn.gate",
                    "mlp.up_proj.weight": "ffn.up",
                    "mlp.down_proj.weight": "ffn.down",
                },
            )
        },
    ),
    "llama, tied": (
        lambda: tiny_llama(tie=True),
        {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"},
        {
            "decoder": (
                "model.layers",
                {
                    **LLAMA_ATTENTION,
                    **LLAMA_NORMS,
                    "mlp.gate_proj.weight": "ffn.gate",
                    "mlp.up_proj.weight": "ffn.up",
                    "mlp.down_proj.weight": "ffn.down",
                },
            )
        },
    ),
    "gpt2": (
        tiny_gpt2,
        {
            "transformer.wte.weight": "embedding",
            "transformer.wpe.weight": "embedding",
            "transformer.ln_f.weight": "norm",
        },
        {
            "decoder": (
                "transformer.h",
                {
                    "ln_1.weight": "norm",
                    "ln_2.weight": "norm",
                    "attn.c_attn.weight": "attention.qkv",
                    "attn.c_proj.weight": "attention.o",
                    "mlp.c_fc.weight": "ffn.up",
                    "mlp.c_proj.weight": "ffn.down",
                },
            )
        },
    ),
    "bert": (
        tiny_bert,
        {
            "bert.embeddings.word_embeddings.weight": "embedding",
            "bert.embeddings.position_embeddings.weight": "embedding",
            "bert.embeddings.token_type_embeddings.weight": "embedding",
            "bert.embeddings.LayerNorm.weight": "norm",
            "bert.pooler.dense.weight": "other",
            "classifier.weight": "head",
        },
        {
            "encoder": (
                "bert.encoder.layer",
                {
                    "attention.self.query.weight": "attention.q",
                    "attention.self.key.weight": "attention.k",
                    "attention.self.value.weight": "attention.v",
                    "attention.output.dense.weight": "attention.o",
                    "attention.output.LayerNorm.weight": "norm",
                    "intermediate.dense.weight": "ffn.up",
                    "output.dense.weight": "ffn.down",
                    "output.LayerNorm.weight": "norm",
                },
            )
        },
    ),
    "t5": (
        tiny_t5,
        {
            "shared.weight": "embedding",
            "encoder.final_layer_norm.weight": "norm",
            "decoder.final_layer_norm.weight": "norm",
        },
        {
            "encoder": (
                "encoder.block",
                {
                    **T5_SELF,
                    "layer.0.layer_norm.weight": "norm",
                    "layer.1.DenseReluDense.wi.weight": "ffn.up",
                    "layer.1.DenseReluDense.wo.weight": "ffn.down",
                    "layer.1.layer_norm.weight": "norm",
                },
            ),
            "decoder": (
                "decoder.block",
                {
                    **T5_SELF,
                    **T5_CROSS,
                    "layer.0.layer_norm.weight": "norm",
                    "layer.1.layer_norm.weight": "norm",
                    "layer.2.DenseReluDense.wi.weight": "ffn.up",
                    "layer.2.DenseReluDense.wo.weight": "ffn.down",
                    "layer.2.layer_norm.weight": "norm",
                },
            ),
        },
    ),
    "vit": (
        tiny_vit,
        {
            "vit.embeddings.cls_token": "embedding",
            "vit.embeddings.position_embeddings": "embedding",
            "vit.embeddings.patch_embeddings.projection.weight": "embedding",
            "vit.layernorm.weight": "norm",
            "classifier.weight": "head",
        },
        {
            "encoder": (
                "vit.layers",
                {
                    **{f"attention.{part}_proj.weight": f"attention.{part}" for part in "qkvo"},
                    "layernorm_before.weight": "norm",
                    "layernorm_after.weight": "norm",
                    "mlp.fc1.weight": "ffn.up",
                    "mlp.fc2.weight": "ffn.down",
                },
            )
        },
    ),
    "mixtral": (
        tiny_mixtral,
        {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"},
        {
            "decoder": (
                "model.layers",
                {
                    **LLAMA_ATTENTION,
                    **LLAMA_NORMS,
                    "mlp.gate.weight": "router",
                    "mlp.experts.gate_up_proj": "expert.gate_up",
                    "mlp.experts.down_proj": "expert.down",
                },
            )
        },
    ),
}
T5_POSITIONS = "layer.0.SelfAttention.relative_attention_bias.weight"


def expected(family: str) -> dict[str, tuple]:
    """Name -> (role, block, index, stack)."""
    _, outside, stacks = FAMILIES[family]
    roles: dict[str, tuple] = {name: (role, None, None, None) for name, role in outside.items()}
    for stack, (where, inside) in stacks.items():
        for i in range(2):
            block = f"{where}.{i}"
            roles |= {f"{block}.{name}": (role, block, i, stack) for name, role in inside.items()}
            if family == "t5" and i == 0:
                roles[f"{block}.{T5_POSITIONS}"] = ("other", block, 0, stack)
    return roles


def told(network: nn.Module, prefix: str = "") -> dict[str, tuple]:
    """The same of what `weights_by_role` says, without biases."""
    found = {}
    for weight in weights_by_role(network):
        if not weight.is_bias and weight.role not in ("adapter", "beside"):
            block = None if weight.block is None else weight.block.removeprefix(prefix)
            found[weight.name.removeprefix(prefix)] = (weight.role, block, weight.index, weight.stack)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_its_role(family):
    network = FAMILIES[family][0]()
    assert told(network) == expected(family)
    weights = weights_by_role(network)
    assert [w.name for w in weights] == [name for name, _ in network.named_parameters()]
    assert {w.role for w in weights} <= set(ROLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_has_its_matrix_s_role(family):
    by_name = {w.name: w for w in weights_by_role(FAMILIES[family][0]())}
    biases = [w for w in by_name.values() if w.is_bias]
    assert biases or family in ("llama", "llama, tied", "t5", "mixtral")
    for bias in biases:
        weight = by_name[f"{bias.name.removesuffix('bias')}weight"]
        assert (bias.role, bias.block, bias.index) == (weight.role, weight.block, weight.index)


@pytest.mark.parametrize(
    ("network", "layout", "name", "shape"),
    [
        (tiny_llama, "out_in", "model.layers.0.mlp.down_proj.weight", (32, 64)),
        (tiny_gpt2, "in_out", "transformer.h.1.attn.c_attn.weight", (32, 96)),
        (tiny_bert, "out_in", "classifier.weight", (2, 32)),
        (tiny_mixtral, None, "model.layers.0.mlp.experts.down_proj", (4, 32, 64)),
        (tiny_mixtral, None, "model.layers.0.mlp.gate.weight", (4, 32)),
        (tiny_gpt2, None, "transformer.wte.weight", (128, 32)),
    ],
)
def test_layouts_and_shapes(network, layout, name, shape):
    weight = next(w for w in weights_by_role(network()) if w.name == name)
    assert (weight.layout, weight.shape) == (layout, shape)


class Around(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.extra = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_inside_a_lightning_module(family):
    module = Around(FAMILIES[family][0]())
    assert inner_model(module) is module.network
    assert told(module, "network.") == expected(family)
    beside = {w.name for w in weights_by_role(module) if w.role == "beside"}
    assert beside == {"extra.weight", "extra.bias", "norm.weight", "norm.bias"}


def test_auxiliary_heads_stand_beside():
    module = ConceptAwareCausalLM(tiny_llama(), predicted_tokens=2, heads_init="copy")
    assert told(module, "model.") == expected("llama")
    beside = {w.name for w in weights_by_role(module) if w.role == "beside"}
    assert beside
    assert all(name.startswith("auxiliary_heads.") for name in beside)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_same_through_lora(family, in_place):
    import peft

    network, config = FAMILIES[family][0](), peft.LoraConfig(r=2, target_modules="all-linear")
    made = peft.inject_adapter_in_model(config, network) if in_place else peft.get_peft_model(network, config)
    prefix = "" if in_place else "base_model.model."
    found = {name.replace(".base_layer", ""): roles for name, roles in told(made, prefix).items()}
    assert found == expected(family)
    adapters = [w.name for w in weights_by_role(made) if w.role == "adapter"]
    assert adapters
    assert all("lora_" in name for name in adapters)
    layouts = {w.name.replace(".base_layer", ""): w.layout for w in weights_by_role(made)}
    for weight in weights_by_role(FAMILIES[family][0]()):
        assert layouts[f"{prefix}{weight.name}"] == weight.layout


def test_the_same_through_prefix_tuning():
    import peft

    made = peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3))
    assert told(made, "base_model.") == expected("llama")
    assert [w.name for w in weights_by_role(made) if w.role == "adapter"] == ["prompt_encoder.default.embedding.weight"]


def test_peft_inside_a_lightning_module():
    import peft

    module = CausalLM(tiny_llama())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), module)
    by_name = {w.name: w.role for w in weights_by_role(module)}
    assert by_name["model.model.layers.0.self_attn.q_proj.base_layer.weight"] == "attention.q"
    assert by_name["model.lm_head.original_module.weight"] == "head"
    assert by_name["model.lm_head.modules_to_save.default.weight"] == "adapter"


def test_blocks_are_listed_in_order():
    assert [name for name, _ in transformer_blocks(tiny_t5())] == [
        *(f"encoder.block.{i}" for i in range(2)),
        *(f"decoder.block.{i}" for i in range(2)),
    ]
    module = Around(tiny_llama(layers=3))
    assert [name for name, _ in transformer_blocks(module)] == [f"network.model.layers.{i}" for i in range(3)]


def test_final_norms():
    for family, where in {"llama": "model.norm", "gpt2": "transformer.ln_f", "t5": "decoder.final_layer_norm"}.items():
        network = FAMILIES[family][0]()
        assert final_norm(network) is network.get_submodule(where)
    assert final_norm(tiny_bert()) is None


def test_a_leaf_is_no_weight():
    network = tiny_llama()
    PartLeaf(network.model.layers[0].mlp.up_proj, "weight", Part(1, [3]))
    assert told(network) == expected("llama")


def test_a_network_without_blocks():
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"no transformer blocks.*3 x Linear"):
        weights_by_role(nn.Sequential(network))
    weights = weights_by_role(network, need_blocks=False)
    assert [(w.role, w.block, w.layout) for w in weights if not w.is_bias] == [
        ("other", None, "out_in"),
        ("norm", None, None),
        ("other", None, "out_in"),
    ]


def test_plain_pytorch_encoders():
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    by_name = {w.name: (w.role, w.layout) for w in weights_by_role(network)}
    assert by_name["layers.0.self_attn.in_proj_weight"] == ("attention.qkv", None)
    # its weight is read by attention, the layer itself is not called
    assert by_name["layers.0.self_attn.out_proj.weight"] == ("attention.o", None)
    assert by_name["layers.1.linear1.weight"] == ("ffn.up", "out_in")
    assert by_name["layers.1.linear2.weight"] == ("ffn.down", "out_in")


def test_sharded_shapes_are_whole():
    """Under FSDP2 a weight's shape is that of the whole: asked through a DTensor on one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = tiny_llama()
        mesh = init_device_mesh("cpu", (1,))
        linear = layer.model.layers[0].mlp.up_proj
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
        weight = next(w for w in weights_by_role(layer) if w.name.endswith("layers.0.mlp.up_proj.weight"))
        assert weight.shape == (64, 32)
        assert weight.layout == "out_in"
    finally:
        dist.destroy_process_group()
    assert not torch.distributed.is_initialized()
