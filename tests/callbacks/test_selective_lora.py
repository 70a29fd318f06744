"""Gated LoRA blocks: the straight-through formula, closed blocks that are not there, and what is saved of the open."""

from __future__ import annotations

import copy
import json

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.adapters.selective_lora import SelectiveLoraConfig, blocks, is_open
from lightning_peft.callbacks import PEFT, SelectiveLoRA
from lightning_peft.export import export
from lightning_peft.merged import merged_state
from lightning_peft.quantization import quantize
from tests.adapted import QUIET, Classifier, Foreign, fit, loader, logits
from tests.tiny import tiny_gpt2, tiny_llama, tiny_vit

TARGETS = ["q_proj", "down_proj"]


def set_gates(module: nn.Module, values: list[float], adapter_name: str = "default") -> None:
    with torch.no_grad():
        for block, value in zip(blocks(module, adapter_name).values(), values, strict=True):
            block.lora_gate[adapter_name].fill_(value)


def adapted(module: L.LightningModule | None = None, gates: list[float] | None = None, **kwargs) -> L.LightningModule:
    """A module with blocks whose B is not zero."""
    module = module or Foreign()
    SelectiveLoRA(**{"r": 4, "target_modules": TARGETS, **kwargs}).attach(module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    if gates is not None:
        set_gates(module, gates)
    return module


@pytest.mark.parametrize("s", [0.1, 0.7, 0.0999, -0.4])
def test_gradients_are_those_of_the_straight_through_formula(s):
    """By hand in float64, with an upstream gradient that is not uniform."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 5)).double()
    holder = nn.Module()
    holder.network = network
    config = SelectiveLoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    layer = PEFT(config, network="network").attach(holder)[0].double()
    a, b, gate = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_gate.default
    nn.init.normal_(b)
    nn.init.constant_(gate, s)
    x, upstream = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    opened = float(s >= 0.1)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.T + bias + opened * 3.0 * (x @ a.T @ b.T))
    y.backward(upstream)
    # ds = sum g . (scale B A x), whether the gate is open or not; A and B only learn behind an open one.
    torch.testing.assert_close(gate.grad, (upstream * (3.0 * x @ a.T @ b.T)).sum().view(1))
    rows, inner = upstream.flatten(0, 1), (x @ a.T).flatten(0, 1)
    torch.testing.assert_close(b.grad, opened * 3.0 * rows.T @ inner)
    torch.testing.assert_close(a.grad, opened * 3.0 * (rows @ b).T @ x.flatten(0, 1))


def without_closed(module: nn.Module) -> nn.Module:
    """A copy whose closed blocks are taken out, the layers underneath in their places."""
    copied = copy.deepcopy(module)
    for name, layer in blocks(copied.net, "default").items():
        if not is_open(layer, "default"):
            parent, _, child = name.rpartition(".")
            setattr(copied.net.get_submodule(parent), child, layer.base_layer)
    return copied


def test_a_closed_block_adds_exactly_nothing():
    module = adapted(gates=[0.2, 0.099, 0.0, 0.1])
    removed = without_closed(module)
    assert len(blocks(removed.net, "default")) == 2
    assert torch.equal(logits(module.net), logits(removed.net))
    assert not torch.equal(logits(module.net), logits(Foreign().net))
    set_gates(module, [0.0] * 4)
    assert torch.equal(logits(module.net), logits(Foreign().net))


def run(sparsity: float, steps: int = 6, **kwargs) -> tuple[L.LightningModule, L.Trainer]:
    module = Foreign(optimizer="SGD", lr=0.1)
    settings = {"penalty_after": 2, "penalty_unit": "step", "target_modules": TARGETS, "r": 4}
    callback = SelectiveLoRA(sparsity=sparsity, **{**settings, **kwargs})
    return module, fit(module, [callback], steps=steps)


def test_large_sparsity_closes_all_and_none_closes_none():
    module, trainer = run(2.0)
    assert not any(is_open(block, "default") for block in blocks(module, "default").values())
    assert float(trainer.callback_metrics["train_open_blocks"]) == 0
    module, trainer = run(0.0)
    assert all(is_open(block, "default") for block in blocks(module, "default").values())
    assert float(trainer.callback_metrics["train_open_blocks"]) == 1
    assert "training_step" not in module.__dict__


def test_the_penalty_is_lambda_times_the_mean_and_waits():
    """While B is zero the task leaves the gates alone: what moves them is the penalty, lambda / n a step."""
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            gates = [float(s) for s in callback.gates(pl_module).values()]
            seen.append((gates, "train_gate_sparsity" in trainer.callback_metrics))

    class FrozenB(Foreign):
        def configure_optimizers(self):
            gates = [p for n, p in self.named_parameters() if "lora_gate" in n]
            return torch.optim.SGD(gates, lr=0.1)

    module = FrozenB()
    callback = SelectiveLoRA(r=4, target_modules=TARGETS, sparsity=0.4, penalty_after=2, penalty_unit="step")
    trainer = fit(module, [callback, See()], steps=4)
    for step, (gates, penalised) in enumerate(seen):
        expected = 0.15 - max(step - 1, 0) * 0.1 * 0.4 / 4
        assert gates == pytest.approx([expected] * 4, abs=1e-6), step
        assert penalised == (step >= 2)
    last = 0.4 * (0.15 - 0.01)  # logged before the last step
    assert float(trainer.callback_metrics["train_gate_sparsity"]) == pytest.approx(last, abs=1e-6)


def test_the_penalty_waits_for_epochs():
    epochs = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            epochs.append((trainer.current_epoch, "train_gate_sparsity" in trainer.callback_metrics))

    fit(Foreign(), [SelectiveLoRA(r=4, target_modules=TARGETS, penalty_after=1), See()], steps=8)
    assert all(penalised == (epoch >= 1) for epoch, penalised in epochs)
    assert {epoch for epoch, _ in epochs} == {0, 1}


def test_the_penalty_rests_at_the_target():
    """Four blocks, half of them may stay: the penalty closes blocks until two are open, and no further."""

    class OnlyGates(Foreign):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if "lora_gate" in n], lr=0.1)

    module = OnlyGates()
    callback = SelectiveLoRA(
        r=4, target_modules=TARGETS, sparsity=0.4, penalty_after=0, penalty_unit="step", target_active=0.5
    )
    callback.attach(module)
    set_gates(module, [0.105, 0.105, 0.2, 0.3])
    fit(module, [callback], steps=10)
    gates = [float(s) for s in callback.gates(module).values()]
    assert gates == pytest.approx([0.095, 0.095, 0.19, 0.29], abs=1e-6)


def test_a_task_that_needs_one_layer_keeps_that_layer_open():
    """The target differs from the base in one layer's weight, by a change of rank 2."""
    torch.manual_seed(0)
    base = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    target = copy.deepcopy(base)
    with torch.no_grad():
        target[4].weight += 2.0 * torch.randn(8, 2) @ torch.randn(2, 8) / 4
    x = torch.randn(256, 8)
    y = target(x).detach()

    class Regression(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(base)

        def training_step(self, batch, batch_idx):
            return 10 * nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Regression()
    callback = SelectiveLoRA(
        r=2, alpha=4, target_modules=["0", "2", "4", "6"], sparsity=0.1, penalty_after=30, penalty_unit="step"
    )
    rows = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=256)
    trainer = L.Trainer(**QUIET, max_steps=300, enable_checkpointing=False, callbacks=[callback], log_every_n_steps=100)
    trainer.fit(module, rows)
    opened = {name for name, block in blocks(module.net, "default").items() if is_open(block, "default")}
    assert opened == {"4"}
    assert float(nn.functional.mse_loss(module.net(x), y)) < 0.05 * float(nn.functional.mse_loss(base(x), y))


@pytest.mark.parametrize("source", ["module", "checkpoint"])
def test_what_is_saved_is_ordinary_lora_on_the_open_blocks(source, tmp_path):
    module = adapted(gates=[0.2, 0.05, 0.3, 0.0])
    if source == "checkpoint":
        callback = SelectiveLoRA(r=4, target_modules=TARGETS)
        saving = ModelCheckpoint(tmp_path, "x")
        module.lr = 0.0
        fit(module, [callback, saving], steps=1)
        export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    else:
        export(module, str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    opened = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == opened
    assert config["rank_pattern"] == dict.fromkeys(opened, 4)
    assert "threshold" not in config
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == 4
    assert torch.equal(logits(theirs), logits(module.net))


def test_the_ranks_of_a_pattern_are_kept(tmp_path):
    module = Foreign()
    config = SelectiveLoraConfig(
        r=4, target_modules=TARGETS, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5}
    )
    PEFT(config).attach(module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    set_gates(module, [0.2, 0.2, 0.0, 0.2])
    export(module, str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"]["model.layers.1.mlp.down_proj"] == 2
    assert saved["alpha_pattern"] == {
        "model.layers.0.self_attn.q_proj": 5,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.mlp.down_proj": 8,
    }
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))), logits(module.net))


def test_nothing_open_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no block of the Selective LoRA adapter is open"):
        export(adapted(gates=[0.0] * 4), str(tmp_path))


def test_peft_saves_and_loads_the_gates_as_well(tmp_path):
    config = SelectiveLoraConfig(r=4, target_modules=TARGETS, threshold=0.2, gate_init=0.25)
    theirs = peft.get_peft_model(tiny_llama(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    set_gates(theirs, [0.3, 0.15, 0.25, 0.19])
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(logits(again), logits(theirs))
    ours = Foreign()
    PEFT(adapter=str(tmp_path)).attach(ours)
    assert torch.equal(logits(ours.net), logits(theirs))
    assert [is_open(block, "default") for block in blocks(ours.net, "default").values()] == [True, False, True, False]


def test_merging_adds_the_open_blocks_and_unmerging_takes_them_out():
    module = adapted(gates=[0.2, 0.05, 0.3, 0.0])
    expected, base = logits(module.net), tiny_llama()
    base.load_state_dict(merged_state(module.net))
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=1e-5)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(base.state_dict()[name], tiny_llama().state_dict()[name])
    layer = blocks(module.net, "default")["model.layers.0.self_attn.q_proj"]
    before = layer.base_layer.weight.clone()
    for safe in (True, False):
        layer.merge(safe_merge=safe)
        assert not torch.allclose(layer.base_layer.weight, before)
        layer.unmerge()
        torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-6)


def test_gates_are_pictured(tmp_path):
    module = Foreign()
    callback = SelectiveLoRA(r=4, target_modules=TARGETS, picture=True)
    fit(module, [callback], steps=1, path=tmp_path)
    assert (tmp_path / "gate_sparsity.png").stat().st_size > 1000


def test_vit():
    class Images(Foreign):
        def build(self):
            self.net = tiny_vit()

        def loss(self, batch):
            return self.net(pixel_values=batch["pixels"], labels=batch["class"]).loss

    module = Images()
    size = module.net.config.image_size
    rows = [
        {"pixels": torch.randn(module.net.config.num_channels, size, size), "class": torch.tensor(i % 2)}
        for i in range(8)
    ]
    callback = SelectiveLoRA(
        r=2,
        sparsity=20.0,
        penalty_after=1,
        penalty_unit="step",
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    trainer = L.Trainer(**QUIET, max_steps=4, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, DataLoader(rows, batch_size=4))
    assert "train_gate_sparsity" in trainer.callback_metrics
    assert any("classifier.modules_to_save" in n for n, p in module.named_parameters() if p.requires_grad)
    assert blocks(module.net, "default")


def test_bert():
    module = Classifier()
    trainer = fit(module, [SelectiveLoRA(r=2, penalty_after=0, target_modules=["query", "value"])], steps=3)
    assert len(blocks(module.net, "default")) == 4
    assert float(trainer.callback_metrics["train_gate_sparsity"]) > 0


def test_transposed_layers():
    class GPT2(Foreign):
        def build(self):
            self.net = tiny_gpt2()

    module = adapted(GPT2(), target_modules=["c_attn"])
    base = GPT2()
    assert not torch.equal(logits(module.net), logits(base.net))
    merged = tiny_gpt2()
    merged.load_state_dict(merged_state(module.net))
    torch.testing.assert_close(logits(merged), logits(module.net), rtol=0, atol=1e-5)
    set_gates(module, [0.0, 0.0])
    assert torch.equal(logits(module.net), logits(base.net))


def test_a_4_bit_base():
    pytest.importorskip("bitsandbytes")
    module = Foreign(hidden=64)  # bitsandbytes needs a block of 64 in a row
    quantize(module.net, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    adapted(module, gates=[0.0] * 4)
    module.loss(next(iter(loader()))).backward()
    gates = [block.lora_gate.default.grad for block in blocks(module.net, "default").values()]
    assert all(float(gradient.abs()) > 0 for gradient in gates)
    closed = logits(module.net)
    set_gates(module, [0.2] * 4)
    assert not torch.equal(logits(module.net), closed)
    for block in blocks(module.net, "default").values():
        block.enable_adapters(False)
    assert torch.equal(logits(module.net), closed)


def test_under_gradient_checkpointing_the_gates_get_the_same_gradient():
    batch, found = next(iter(loader())), []
    for recompute in (False, True):
        module = Foreign()
        if recompute:
            module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        adapted(module, gates=[0.2, 0.05, 0.3, 0.0]).train()
        module.loss(batch).backward()
        found.append(torch.cat([block.lora_gate.default.grad for block in blocks(module.net, "default").values()]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": -1.0}, "sparsity=-1.0 and penalty_after=2 must be at least 0"),
        ({"penalty_unit": "day"}, r"penalty_unit='day' is not known: use one of \('epoch', 'step'\)"),
        ({"target_active": 0.0}, r"target_active=0.0 is a share of the blocks and must lie in \(0, 1\]"),
        ({"gate_init": 0.05}, "threshold=0.1 must lie above 0 and not above gate_init=0.05"),
        (
            {"target_modules": ["embed_tokens"]},
            "gates linear and convolutional layers, and model.embed_tokens is a Emb",
        ),
        ({"target_modules": ["nothing"]}, "has no module named 'nothing'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectiveLoRA(**arguments).attach(Foreign())


@pytest.mark.parametrize(
    "arguments", [{"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_a_start_that_changes_the_base_is_refused(arguments):
    with pytest.raises(ValueError, match="a closed block has to leave the base as it was"):
        SelectiveLoraConfig(target_modules=TARGETS, **arguments)


def test_another_variant_is_refused():
    config = SelectiveLoraConfig(target_modules=TARGETS, use_dora=True)
    with pytest.raises(ValueError, match="does not combine with another variant of LoRA"):
        PEFT(config).attach(Foreign())
