"""KaSA: its two regularisers against PEFT and by hand, and a base that is truncated exactly once."""

from __future__ import annotations

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.adapters.injection import tuner_of
from lightning_peft.callbacks import DeltaCheckpoint, KaSA, RandomState
from lightning_peft.callbacks.kasa import kasa_layers, kasa_terms
from lightning_peft.delta import load_delta
from lightning_peft.export import export
from lightning_peft.models import CausalLM
from lightning_peft.quantization import quantize
from tests.adapted import QUIET, Classifier, Foreign, fit, loader, logits
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(**kwargs) -> Foreign:
    """A module with KaSA adapters whose B is not zero."""
    module = Foreign()
    KaSA(r=4, target_modules=TARGETS, **kwargs).attach(module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return module


def by_hand(module: nn.Module, beta: float, gamma: float) -> torch.Tensor:
    """Equations 9 to 11 in float64, layer by layer, with plain loops."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in kasa_layers(module, "default"):
        s, a, b = (
            p.double() for p in (layer.lora_diag["default"], layer.lora_A.default.weight, layer.lora_B.default.weight)
        )
        r = len(s)
        total = total + beta * sum(s[k] ** 2 for k in range(r))
        for gram in (b.T @ b, a @ a.T):
            distance = sum((gram[i, j] - float(i == j)) ** 2 for i in range(r) for j in range(r))
            total = total + gamma * distance.sqrt()
    return total


@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_terms_equal_pefts_own_and_a_hand_computation(beta, gamma):
    module = adapted(beta=beta, gamma=gamma)
    layers = kasa_layers(module, "default")
    assert len(layers) == 6
    trained = [p for p in module.parameters() if p.requires_grad]
    squares, distance = kasa_terms(layers, "default")
    ours = beta * squares + gamma * distance
    theirs = tuner_of(module.net)._get_kasa_loss()
    truth = by_hand(module, beta, gamma)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    for made, expected in zip(*(torch.autograd.grad(3.0 * x, trained) for x in (ours, truth))):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_orthonormal_factors_cost_nothing_and_have_no_gradient():
    module = adapted()
    layers = kasa_layers(module, "default")
    for layer in layers:
        for weight in (layer.lora_A.default.weight, layer.lora_B.default.weight):
            nn.init.orthogonal_(weight)
    _, distance = kasa_terms(layers, "default")
    assert float(distance) == pytest.approx(0, abs=1e-5)
    distance.backward()
    assert all(layer.lora_B.default.weight.grad.isfinite().all() for layer in layers)


def test_one_product_for_all_layers_of_a_shape():
    products = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                products.append(function)
            return function(*args, **(kwargs or {}))

    layers = kasa_layers(adapted(), "default")
    with Count():
        kasa_terms(layers, "default")
    # A and B of q [32, 32], v [16, 32] and down [32, 64]: inputs of 32 (with B of q and down), of 64, outputs of 16.
    assert len(products) == 3


def test_terms_are_exact_under_bf16_mixed():
    layers = kasa_layers(adapted(), "default")
    exact = kasa_terms(layers, "default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(kasa_terms(layers, "default")), torch.stack(exact))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["foreign", "ours"])
def test_the_loss_gets_both(kind, reduction):
    """SGD's step on the adapter equals the step on the plain loss plus PEFT's own term."""

    def made():
        torch.manual_seed(5)
        if kind == "foreign":
            module = Foreign(optimizer="SGD", lr=0.1)
        else:
            module = CausalLM(tiny_llama(), optimizer="sgd", learning_rate=0.1, lr_scheduler="constant")
        callback = KaSA(r=4, beta=0.1, gamma=0.2, target_modules=TARGETS, reduction=reduction)
        callback.attach(module)
        return module, callback

    reference, _ = made()
    batch = next(iter(loader()))
    network = reference.net if kind == "foreign" else reference.model
    scale = 1 / 6 if reduction == "mean" else 1
    loss = network(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss
    (loss + scale * tuner_of(network)._get_kasa_loss()).backward()
    module, callback = made()
    rows = [{"ids": r} if kind == "foreign" else {"input_ids": r, "labels": r} for r in batch["ids"]]
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    for (name, p), (_, old) in zip(module.named_parameters(), reference.named_parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p, old - 0.1 * old.grad, rtol=0, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
    logged = {n: float(v) for n, v in trainer.callback_metrics.items() if "kasa" in n}
    assert set(logged) == {"train_kasa_singular_values", "train_kasa_orthogonality"}
    term = scale * float(tuner_of(network)._get_kasa_loss())
    assert sum(logged.values()) == pytest.approx(term, rel=1e-5)


def test_truncation_removes_exactly_the_r_smallest_singular_values():
    module, plain = adapted(), Foreign()
    weights = dict(plain.named_parameters())
    for name in ("q_proj", "v_proj"):
        layer = getattr(module.net.model.layers[1].self_attn, name)
        _check_truncated(layer, weights[f"net.model.layers.1.self_attn.{name}.weight"])
    _check_truncated(module.net.model.layers[0].mlp.down_proj, weights["net.model.layers.0.mlp.down_proj.weight"])


def _check_truncated(layer, before: torch.Tensor) -> None:
    u, s, v = torch.linalg.svd(before.detach().double(), full_matrices=False)
    after = layer.get_base_layer().weight.detach().double()
    removed = (u[:, -4:] * s[-4:]) @ v[-4:]
    torch.testing.assert_close(before.double() - after, removed, rtol=0, atol=1e-6)
    left = torch.linalg.svdvals(after)
    torch.testing.assert_close(left[:-4], s[:-4], rtol=0, atol=1e-6)
    assert float(left[-4:].max()) < 1e-6


def base_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if "base_layer" in n}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_stages_truncate_once():
    module = Foreign()
    callback = KaSA(r=4, target_modules=TARGETS)
    trainer = L.Trainer(**QUIET, max_steps=2, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, loader())
    once = base_of(module)
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, loader())
    assert_equal(base_of(module), once)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("checkpoint", [ModelCheckpoint, DeltaCheckpoint])
def test_a_resumed_run_has_the_truncated_base_to_the_bit(checkpoint, tmp_path):
    """Also where the decomposition came out otherwise (another machine): the checkpoint's base is taken."""
    settings = {"r": 4, "target_modules": TARGETS, "beta": 0.01, "gamma": 0.01, "dropout": 0.1}

    def run(module, steps, **kwargs):
        saving = checkpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(module, [KaSA(**settings), RandomState(), saving], steps=steps, **kwargs)

    torch.manual_seed(1)
    whole = Foreign()
    run(whole, 8)
    resumed = Foreign()
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            if any(target in name for target in TARGETS):
                parameter.add_(1e-7)
    torch.manual_seed(2)
    run(resumed, 8, ckpt_path=str(tmp_path / "step=4.ckpt"))  # the end of an epoch
    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    (own,) = (v for k, v in state["callbacks"].items() if k.startswith("KaSA"))
    truncated = {n.removeprefix("net.") for n in base_of(whole)}
    assert set(own["truncated"]) == truncated
    assert {f"net.{n}" for n in truncated} <= set(state["state_dict"])


def test_a_delta_restores_the_truncated_base(tmp_path):
    module = Foreign()
    saving = DeltaCheckpoint(dirpath=tmp_path, filename="x")
    fit(module, [KaSA(r=4, target_modules=TARGETS), saving])
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert "net.model.embed_tokens.weight" not in saved["state_dict"]
    assert base_of(module).keys() <= saved["state_dict"].keys()
    fresh = Foreign()
    KaSA(r=4, target_modules=TARGETS).attach(fresh)
    load_delta(fresh, tmp_path / "x.ckpt")
    assert torch.equal(logits(fresh.net), logits(module.net))


def test_saved_adapter_loads_in_plain_peft_and_goes_on_here(tmp_path):
    module = adapted()
    export(module, str(tmp_path / "out"))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(theirs), logits(module.net), rtol=0, atol=1e-6)
    again = Foreign()
    callback = KaSA(adapter=str(tmp_path / "out"))
    callback.attach(again)
    torch.testing.assert_close(logits(again.net), logits(module.net), rtol=0, atol=1e-6)
    trainer = fit(again, [callback], steps=2)
    assert float(trainer.callback_metrics["train_kasa_orthogonality"]) > 0


def test_merged_export_is_the_truncated_base_with_the_update(tmp_path):
    module = adapted()
    export(module, str(tmp_path), merge=True)
    merged = type(module.net).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), logits(module.net), rtol=0, atol=1e-5)


def test_bert_with_pefts_choice_of_layers():
    module = Classifier()
    trainer = fit(module, [KaSA(r=4)], steps=2)
    assert {name.split(".")[-1] for name, _ in module.named_modules() if "lora_diag" in name} == {"lora_diag"}
    assert len(kasa_layers(module, "default")) == 4
    assert "train_kasa_singular_values" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "max"}, r"reduction='max' is not known: use one of \('mean', 'sum'\)"),
        ({"beta": -1.0}, "`beta` must be non-negative"),
        ({"gamma": -1.0}, "`gamma` must be non-negative"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"r": 32, "target_modules": ["q_proj"]}, r"`r` \(32\) to be smaller than min\(in_features, out_features\)"),
        (
            {"target_modules": ["embed_tokens"]},
            r"unquantised nn.Linear layers only, and target_modules=.*embed_tokens.* names another kind",
        ),
        ({"target_modules": ["nothing"]}, "has no module named 'nothing'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        KaSA(**arguments).attach(Foreign())


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="lm_head is also another module's"):
        KaSA(r=4, target_modules=["lm_head"]).attach(Foreign(tie=True))


def test_a_quantised_base_is_refused():
    pytest.importorskip("bitsandbytes")
    module = Foreign()
    quantize(module.net, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ValueError, match="q_proj is a Linear4bit, which PEFT would give ordinary LoRA"):
        KaSA(r=4, target_modules=["q_proj"]).attach(module)


def test_transposed_layers_are_refused():
    class GPT2(Foreign):
        def build(self):
            self.net = tiny_gpt2()

    with pytest.raises(ValueError, match="KaSA does not support `fan_in_fan_out=True`"):
        KaSA(r=4, target_modules=["c_attn"]).attach(GPT2())


def test_another_kind_of_adapter_is_refused(tmp_path):
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no KaSA adapter"):
        KaSA(adapter=str(tmp_path)).attach(Foreign())


def test_a_bert_head_trains_whole_beside_it():
    module = Classifier()
    KaSA(r=4).attach(module)
    assert any("classifier.modules_to_save" in n for n, p in module.named_parameters() if p.requires_grad)
    assert isinstance(module.net, type(tiny_bert()))
