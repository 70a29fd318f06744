"""Any PEFT method on LightningModules that know nothing of it."""

from __future__ import annotations

import copy
import json

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_peft.adapters.injection import tuner_of
from lightning_peft.callbacks.peft import PEFT
from tests.adapted import LORA, QUIET, BuiltLater, Classifier, Foreign, fit, loader, logits
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama

METHODS = [
    LORA,
    {**LORA, "use_dora": True},
    {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
    {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"peft_type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"]},
    {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]},
]


def adapter_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def frozen_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config", METHODS, ids=lambda c: c["peft_type"] + ("-dora" if "use_dora" in c else ""))
def test_only_the_adapter_moves(config):
    module = Foreign()
    callback = PEFT(config)
    callback.attach(module)
    before, frozen = adapter_values(module), frozen_values(module)
    trainer = fit(module, [callback])
    after = adapter_values(module)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert same(frozen, frozen_values(module))
    state = trainer.optimizers[0].state
    assert {id(p) for p in state} == {id(p) for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize("config", METHODS[:5], ids=lambda c: c["peft_type"] + ("-dora" if "use_dora" in c else ""))
def test_same_numbers_as_peft_itself(config):
    """The in-place network trains exactly like `peft.get_peft_model` around the same network."""
    ours = Foreign(optimizer="SGD", lr=0.5)
    theirs = Foreign(optimizer="SGD", lr=0.5)
    torch.manual_seed(3)
    PEFT(config).attach(ours)
    given = {k: v for k, v in config.items() if k != "peft_type"}
    torch.manual_seed(3)
    theirs.net = peft.get_peft_model(
        theirs.net, peft.get_peft_config({**given, "peft_type": config["peft_type"], "task_type": "CAUSAL_LM"})
    )
    fit(ours, [], steps=3)
    fit(theirs, [], steps=3)
    assert torch.equal(logits(ours.net), logits(theirs.net))
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("module_class", [Foreign, BuiltLater])
@pytest.mark.parametrize(
    "config", [LORA, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}], ids=["lora", "prompt"]
)
def test_fit_validate_test_fit_keeps_the_adapter(module_class, config):
    module, callback = module_class(), PEFT(config)
    trainer = L.Trainer(**QUIET, max_steps=3, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, loader())
    kept = adapter_values(module)
    assert kept
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    assert same(kept, adapter_values(module))
    L.Trainer(**QUIET, enable_checkpointing=False, callbacks=[PEFT(config)]).test(module, loader(), verbose=False)
    assert same(kept, adapter_values(module))
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module, loader())
    after = adapter_values(module)
    assert kept.keys() == after.keys()
    assert not same(kept, after)
    assert "configure_model" not in module.__dict__


def test_kasa_truncates_the_base_once_and_its_loss_stays_in_reach():
    config = {**LORA, "kasa_config": peft.KasaConfig()}
    module, callback = Foreign(), PEFT(config)
    weight = module.net.model.layers[0].self_attn.q_proj.weight
    rank = min(weight.shape)
    trainer = fit(module, [callback], steps=2)
    trainer.test(module, loader(), verbose=False)
    PEFT(config).attach(module)
    # The paper drops the r smallest singular values, once.
    assert torch.linalg.matrix_rank(weight.detach()) == rank - 4
    assert float(tuner_of(module.net)._get_kasa_loss()) > 0


def test_bf16_base_gets_an_fp32_adapter():
    module = Foreign()
    module.net.to(torch.bfloat16)
    PEFT(LORA).attach(module)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    module = Foreign()
    module.net.to(torch.bfloat16)
    PEFT(LORA, autocast_adapter_dtype=False).attach(module)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_classification_trains_its_head_without_being_told():
    module = Classifier()
    PEFT({"peft_type": "LORA", "target_modules": ["query", "value"]}).attach(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert "net.classifier.modules_to_save.default.weight" in trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_two_adapters_with_two_names_both_train():
    module = Foreign()
    callbacks = [PEFT(LORA), PEFT({**LORA, "target_modules": ["o_proj"]}, adapter_name="second")]
    fit(module, callbacks)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("q_proj.lora_B.default" in name for name in trained)
    assert any("o_proj.lora_B.second" in name for name in trained)
    values = adapter_values(module)
    assert all(float(values[name].abs().sum()) > 0 for name in trained if "lora_B" in name)


def test_the_same_name_twice_is_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PEFT`"):
        L.Trainer(**QUIET, callbacks=[PEFT(LORA), PEFT({**LORA, "r": 2})])
    module = Foreign()
    PEFT(LORA).attach(module)
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        PEFT({**LORA, "r": 2}).attach(module)


def test_starts_from_an_existing_adapter_and_trains_it(tmp_path):
    torch.manual_seed(7)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    module = Foreign()
    callback = PEFT(adapter=str(tmp_path))
    callback.attach(module)
    assert torch.allclose(logits(module.net), logits(theirs), atol=1e-6)
    before = adapter_values(module)
    fit(module, [callback])
    assert not same(before, adapter_values(module))


def test_a_second_network_has_to_be_named():
    class Two(Foreign):
        def build(self):
            self.net, self.teacher = tiny_llama(), tiny_gpt2()

    with pytest.raises(ValueError, match=r"holds 2 networks \(net, teacher\)"):
        PEFT(LORA).attach(Two())
    module = Two()
    PEFT(LORA, network="net").attach(module)
    assert not any("lora" in name for name, _ in module.teacher.named_parameters())


def test_a_network_that_is_not_transformers():
    class Plain(Foreign):
        def build(self):
            self.net = nn.Sequential(nn.Embedding(128, 16), nn.Linear(16, 128))

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch["ids"]).flatten(0, 1), batch["ids"].flatten())

    module = Plain()
    fit(module, [PEFT({"peft_type": "LORA", "target_modules": ["1"]})])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"net.1.lora_A.default.weight", "net.1.lora_B.default.weight"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORO"}, "'LORO' is not known to PEFT; closest: .*LORA"),
        ({"r": 4}, "no peft_type"),
        ({**LORA, "lora_alfa": 3}, "LoraConfig has no argument 'lora_alfa'; closest: lora_alpha"),
        ({**LORA, "target_modules": ["q_porj"]}, "LlamaForCausalLM has no module named 'q_porj'; closest: .*q_proj"),
        ({**LORA, "target_modules": ["q_proj", "query"]}, "no module named 'query'"),
        ({**LORA, "target_modules": r".*\.nothing"}, "regular expression, matches no module"),
        ({**LORA, "modules_to_save": ["lm_hed"]}, "modules_to_save: .*'lm_hed'; closest: lm_head"),
    ],
)
def test_a_wrong_config_is_refused_before_any_step(config, message):
    with pytest.raises(ValueError, match=message):
        fit(Foreign(), [PEFT(config)])


def test_config_or_adapter():
    for arguments in ({}, {"config": LORA, "adapter": "x"}):
        with pytest.raises(ValueError, match="one of the two"):
            PEFT(**arguments)


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_weight_averaging_has_to_come_after(averaging):
    with pytest.raises(ValueError, match="put PEFT first"):
        fit(Foreign(), [averaging(), PEFT(LORA)])
    module = Foreign()
    fit(module, [PEFT(LORA), averaging()])
    assert any("lora_" in name for name, p in module.named_parameters() if p.requires_grad)


def test_spawned_processes_are_refused():
    callback = PEFT(LORA)
    trainer = L.Trainer(**QUIET, strategy="ddp_spawn", devices=2, callbacks=[callback])
    with pytest.raises(ValueError, match="Use strategy='ddp'"):
        callback.setup(trainer, Foreign(), "fit")


def test_bitsandbytes_precision_is_refused():
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    callback = PEFT(LORA)
    trainer = L.Trainer(**QUIET, callbacks=[callback])
    trainer.strategy.precision_plugin = BitsandbytesPrecision("nf4", torch.float32)
    with pytest.raises(ValueError, match="quantization_config"):
        callback.setup(trainer, Foreign(), "fit")


def test_best_checkpoint_is_tested(tmp_path):
    module, callback = Foreign(lr=3e-2), PEFT(LORA)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", every_n_epochs=1)  # the first epoch's
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=[callback, best])
    trainer.fit(module, loader(), loader())
    last = trainer.validate(module, loader(), verbose=False)[0]["val_loss"]
    tested = trainer.test(module, loader(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert tested == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert tested > last + 1e-3


def test_checkpoints_are_json_and_tensors_and_load_elsewhere(tmp_path):
    module = Foreign()
    fit(module, [PEFT(LORA), ModelCheckpoint(tmp_path, filename="x")])
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    other = Foreign()
    PEFT(LORA).attach(other)
    other.load_state_dict(loaded["state_dict"])
    assert torch.equal(logits(other.net), logits(module.net))
    state = next(v for k, v in loaded["callbacks"].items() if k.startswith("PEFT"))
    assert json.loads(state["config"])["r"] == 4


def test_a_moved_adapter_folder_does_not_stop_a_resume(tmp_path):
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    fit(Foreign(), [PEFT(adapter=str(tmp_path / "a")), ModelCheckpoint(tmp_path, filename="x")], steps=2)
    (tmp_path / "a").rename(tmp_path / "b")
    module = Foreign()
    fit(module, [PEFT(adapter=str(tmp_path / "a"))], steps=4, ckpt_path=str(tmp_path / "x.ckpt"))
    assert any("lora_" in n for n in adapter_values(module))


def test_deepcopied_modules_keep_their_own_tuner():
    module = Foreign()
    PEFT(LORA).attach(module)
    copied = copy.deepcopy(module)
    assert tuner_of(copied.net).model is copied.net


def test_gradient_checkpointing_reaches_the_adapter():
    module = Foreign()
    module.net.gradient_checkpointing_enable()
    PEFT(LORA).attach(module)
    module.train()
    module.loss(next(iter(loader()))).backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "lora_B" in n)


def test_bert_for_a_task_that_is_given():
    module = Classifier()
    PEFT(
        {"peft_type": "LORA", "target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    ).attach(module)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in n for n in trained)
    assert any("classifier.modules_to_save" in n for n in trained)
    assert isinstance(module.net, type(tiny_bert()))


def test_a_4_bit_base_that_was_evaluated_still_trains_its_adapter():
    """bitsandbytes packs layers anew in evaluation where the CPU has AVX512-BF16; what is packed has no gradient."""
    pytest.importorskip("bitsandbytes")
    gradients = []
    for evaluated in (False, True):
        L.seed_everything(0, verbose=False)
        module = Foreign(hidden=64)
        config = {**LORA, "init_lora_weights": False}
        PEFT(config, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).attach(module)
        if evaluated:
            module.eval()
            with torch.no_grad():
                module.loss(next(iter(loader())))
            module.train()
        module.loss(next(iter(loader()))).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
