"""Masked neurons and dropped feed-forward parts: what the network then computes, and that the draws can be repeated."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.callbacks import PEFT
from lightning_peft.callbacks.trans_peft import TransPEFT
from tests.adapted import LORA, QUIET, Classifier, Foreign, fit, loader
from tests.processes import run_on_two
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

ALWAYS = 1 - 1e-9
IDS = torch.arange(5, 21).view(2, 8)


def trainer_with(callback: TransPEFT) -> L.Trainer:
    return L.Trainer(**QUIET, callbacks=[callback], enable_checkpointing=False)


class On:
    """A network with the callback's hooks in place, as within a training batch."""

    def __init__(self, network: nn.Module, **arguments) -> None:
        self.network, self.callback = network, TransPEFT(**arguments)
        trainer = trainer_with(self.callback)
        trainer.state.stage = RunningStage.TRAINING
        self.module = L.LightningModule()
        self.module.model = network
        self.callback.setup(trainer, self.module, "fit")
        self.callback.on_fit_start(trainer, self.module)
        self.trainer = trainer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.callback.teardown(self.trainer, self.module, "fit")


def call(network: nn.Module) -> torch.Tensor:
    kind = type(network).__name__
    if kind.startswith("ViT"):
        size = network.config.image_size
        pixels = torch.linspace(-1, 1, 2 * network.config.num_channels * size * size)
        return network(pixel_values=pixels.view(2, network.config.num_channels, size, size))[0]
    if kind.startswith("T5"):
        return network(input_ids=IDS, labels=IDS).logits
    return network(input_ids=IDS)[0]


def without_ffn(network: nn.Module) -> nn.Module:
    """The reference: every feed-forward part gives zero; in BERT, the block is its attention alone."""
    for name, module in network.named_modules():
        if type(module).__name__ == "BertLayer":
            module.feed_forward_chunk = lambda attention_output: attention_output
        if name.rpartition(".")[2] in ("down_proj", "wo", "fc2") or name.endswith("mlp.c_proj"):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return network


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit, tiny_t5], ids=lambda f: f.__name__)
def test_a_dropped_part_is_the_network_without_it(make):
    """Norms included where they are the part's own (BERT); the residual is counted once."""
    expected = call(without_ffn(make()))
    with On(make(), drop_probability=ALWAYS) as on:
        torch.testing.assert_close(call(on.network), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(call(on.network), call(make()), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit, tiny_t5], ids=lambda f: f.__name__)
def test_what_stands_in_a_dropped_part_gets_zero_and_costs_nothing(make):
    sizes = []
    with On(make(), drop_probability=ALWAYS) as on:
        for name, module in on.network.named_modules():
            if name.rpartition(".")[2] in ("down_proj", "wo", "fc2") or name.endswith(("mlp.c_proj", ".output.dense")):
                if "attention" in name:
                    continue
                module.register_forward_hook(lambda m, args, out: sizes.append(args[0].numel()))
        output = call(on.network)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert sizes
    assert set(sizes) == {0}
    gradients = {name: p.grad for name, p in on.network.named_parameters()}
    inside = {n: g for n, g in gradients.items() if ".mlp." in n or "intermediate" in n or "DenseReluDense" in n}
    assert inside
    assert all(g is not None and not g.any() for g in inside.values())
    assert any(g is not None and g.any() for n, g in gradients.items() if n not in inside)


def test_a_masked_neuron_is_the_network_without_it():
    """By hand: the mask is drawn again and multiplied onto act(gate(h)) * up(h), nothing is rescaled."""
    with On(tiny_llama(layers=1), mask_probability=0.4, drop_probability=0.0) as on:
        made = call(on.network)
        mlp = on.network.model.layers[0].mlp
        mask = on.callback.masked(0, torch.ones(2, 8, mlp.down_proj.in_features))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 0.5 < float(mask.mean()) < 0.7

    def forward(h):
        return nn.functional.linear(nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h) * mask, mlp.down_proj.weight)

    mlp.forward = forward
    torch.testing.assert_close(made, call(on.network), rtol=0, atol=1e-6)


def test_shares_and_expectation():
    """Each entry is kept with 1 - p_m, whatever its token and neuron; the mean is (1 - p_m) times the input."""
    callback = TransPEFT(mask_probability=0.3, drop_probability=0.2)
    trainer = trainer_with(callback)
    callback.setup(trainer, L.LightningModule(), "fit")
    inner = torch.rand(64, 32, 16)
    masks, drops = [], []
    for batch in range(60):
        trainer.fit_loop.epoch_loop.batch_progress.total.ready = batch + 1
        masked = callback.masked(0, inner)
        assert torch.equal(masked[masked != 0], inner[masked != 0])
        masks.append((masked != 0).float())
        drops += [callback.drops(layer) for layer in range(50)]
    kept = torch.stack(masks)
    # 60 draws of 32,768: the standard deviation of the mean is 0.0003.
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.002)
    for dim in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):
        assert float((kept.mean(dim) - 0.7).abs().max()) < 0.03
    assert sum(drops) / len(drops) == pytest.approx(0.2, abs=0.03)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], (callback.masked(1, inner) != 0).float())


def run(
    steps: int = 4, checkpointing: bool = False, path=None, callbacks=(), module=None, **arguments
) -> L.LightningModule:
    torch.manual_seed(2)
    module = module or Foreign(optimizer="SGD", lr=0.1)
    if checkpointing:
        module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [] if arguments == {"off": True} else [TransPEFT(**arguments)]
    lora = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    fit(module, [PEFT(lora), *trained, *callbacks], steps=steps, path=path)
    return module


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_probabilities_of_zero_change_no_bit():
    module = run(mask_probability=0.0, drop_probability=0.0)
    assert apart(module, run(off=True)) == 0
    assert apart(module, run(mask_probability=0.3)) > 1e-4


def test_the_same_draws_under_gradient_checkpointing():
    """The recomputation in the backward sees what the forward saw, though it draws no number of torch's."""
    settings = {"mask_probability": 0.4, "drop_probability": 0.4}
    module = run(**settings)
    assert apart(module, run(checkpointing=True, **settings)) < 1e-6
    assert apart(module, run(seed=1, **settings)) > 1e-4


def test_the_same_draws_after_a_resume(tmp_path):
    """Without any state, and without the RandomState callback."""
    settings = {"mask_probability": 0.3, "drop_probability": 0.3}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole = run(steps=8, callbacks=[saving], **settings)
    torch.manual_seed(9)
    resumed = Foreign(optimizer="SGD", lr=0.1)
    lora = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    fit(resumed, [PEFT(lora), TransPEFT(**settings)], steps=8, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert apart(whole, resumed) == 0
    other = copy.deepcopy(whole)
    fit(other, [PEFT(lora), TransPEFT(**settings, seed=5)], steps=8, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert apart(whole, other) > 1e-5


def test_nothing_acts_in_evaluation():
    """Neither in the validation within fit nor afterwards, and no hook is left."""
    seen = []

    class See(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clean = copy.deepcopy(pl_module.net)
            for part in clean.modules():
                part._forward_hooks.clear()
                part._forward_pre_hooks.clear()
            with torch.no_grad():
                seen.append(torch.equal(clean(batch["ids"]).logits, pl_module.net(batch["ids"]).logits))

    module = Foreign()
    callbacks = [TransPEFT(mask_probability=0.5, drop_probability=0.5), See()]
    trainer = L.Trainer(**QUIET, max_steps=4, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(module, loader(), loader(4))
    assert seen
    assert all(seen)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_the_adapter_of_the_down_projection_sees_the_masked_neurons():
    module = Foreign()
    PEFT({**LORA, "target_modules": ["down_proj"]}).attach(module)
    seen = []
    down = module.net.model.layers[0].mlp.down_proj
    with On(module.net, mask_probability=0.5, drop_probability=0.0):
        down.lora_A.default.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        call(module.net)
    assert 0.4 < float((seen[0] == 0).float().mean()) < 0.6


def test_an_adapter_beside_the_part_still_runs():
    module = Foreign()
    config = {"peft_type": "BOTTLENECK", "form": "parallel", "position": "ffn", "bottleneck": 4}
    PEFT(config).attach(module)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    reference = copy.deepcopy(module)
    for name, parameter in reference.named_parameters():
        if "down_proj" in name:
            nn.init.zeros_(parameter)
    with On(module.net, drop_probability=ALWAYS):
        torch.testing.assert_close(call(module.net), call(reference.net), rtol=0, atol=1e-6)
    assert not torch.allclose(call(reference.net), call(without_ffn(tiny_llama())), atol=1e-4)


def on_two(rank: int) -> tuple:
    from lightning.pytorch.strategies import DDPStrategy

    module = Foreign(optimizer="SGD", lr=0.1)
    drawn = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            mask = callback.masked(0, torch.ones(4, 16))
            drawn.append(([callback.drops(layer) for layer in range(8)], mask.flatten().tolist()))

    callback = TransPEFT(mask_probability=0.5, drop_probability=0.5)
    lora = PEFT({**LORA, "target_modules": ["down_proj"]})
    trainer = L.Trainer(
        **QUIET,
        max_steps=4,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[lora, callback, See()],
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(16, 2))
    return drawn, {n: p for n, p in values(module).items() if "lora" in n}


def test_ranks_drop_the_same_parts_and_mask_their_own_neurons():
    """Adapters in a dropped part do not stop DDP, which waits for every gradient."""
    (first, first_weights), (second, second_weights) = run_on_two(on_two)
    assert [drops for drops, _ in first] == [drops for drops, _ in second]
    assert all(a != b for (_, a), (_, b) in zip(first, second))
    assert any(any(drops[:2]) for drops, _ in first)
    assert all(torch.equal(first_weights[n], second_weights[n]) for n in first_weights)


def test_a_classifier_and_manual_optimisation():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = Manual()
    before = values(copy.deepcopy(module))
    fit(module, [TransPEFT(drop_probability=ALWAYS)], steps=2)
    moved = {name for name, value in values(module).items() if not torch.equal(value, before[name])}
    assert any("attention" in name for name in moved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_probability": 1.0}, r"mask_probability=1.0 must lie in \[0, 1\)"),
        ({"drop_probability": -0.1}, r"drop_probability=-0.1 must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransPEFT(**arguments)


def test_two_are_refused():
    with pytest.raises(ValueError, match="two TransPEFT callbacks would mask and drop the same parts"):
        fit(Foreign(), [TransPEFT(), TransPEFT(seed=1)], steps=1)


def test_experts_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}

    class MoE(Foreign):
        def build(self):
            config = MixtralConfig(vocab_size=128, num_hidden_layers=1, num_local_experts=2, **sizes)
            self.net = MixtralForCausalLM(config)

    with pytest.raises(ValueError, match=r"one down projection, and net.model.layers.0 holds experts"):
        fit(MoE(), [TransPEFT()], steps=1)


def test_a_network_without_blocks_is_refused():
    class Plain(Foreign):
        def build(self):
            self.net = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="no transformer blocks"):
        L.Trainer(**QUIET, max_steps=1, callbacks=[TransPEFT()], enable_checkpointing=False).fit(
            Plain(), DataLoader(torch.zeros(4, 4))
        )
