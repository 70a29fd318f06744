"""Training d numbers: the formula, its gradients, what is saved, rebuilt and resumed, and what is refused."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.callbacks import IntrinsicDimension
from lightning_peft.callbacks.intrinsic_dimension import LAMBDAS, Z, _Place, _projected, apply_intrinsic
from lightning_peft.fastfood import PROJECTIONS
from lightning_peft.models import SequenceClassifier
from tests.callbacks.test_half_finetuning import causal, copied, fit, trained
from tests.conformance.data import Rows
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama


def classifier(**arguments) -> SequenceClassifier:
    return SequenceClassifier(tiny_bert(), lr_scheduler="constant", learning_rate=0.02, **arguments)


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
@pytest.mark.parametrize("structure_aware", [True, False])
def test_weights_are_where_the_formula_puts_them(projection, structure_aware):
    module = causal(tiny_llama())
    before = copy.deepcopy(module.model)
    callback = IntrinsicDimension(64, projection, structure_aware, seed=5)
    fit(module, callback, max_steps=3)
    numbers = callback.numbers()
    names = [full for *_, full in _projected(before)]
    assert len(numbers[Z]) + len(numbers.get(LAMBDAS, ())) == 64
    assert numbers[Z].abs().min() > 0
    assert not structure_aware or not torch.equal(numbers[LAMBDAS], torch.ones(len(names)))
    for number, name in enumerate(names):
        start, made = before.get_parameter(name), module.model.get_parameter(name)
        p = PROJECTIONS[projection](len(numbers[Z]), start.numel(), 5, name)
        scale = numbers[LAMBDAS][number] if structure_aware else 1.0
        torch.testing.assert_close(made, start + scale * p(numbers[Z]).view_as(start), rtol=0, atol=1e-6)
    assert torch.equal(module.model.lm_head.weight, before.lm_head.weight)
    assert len(names) == len(list(before.parameters())) - 1


def test_gradients_are_the_projected_ones_of_full_fine_tuning():
    """d loss / d z = sum_i lambda_i P_i^T g_i and d loss / d lambda_i = <P_i z, g_i>, away from the start."""
    module = causal(tiny_gpt2(tie_word_embeddings=False))
    callback = IntrinsicDimension(50, seed=2)
    callback._module = module
    callback._begin(module)
    with torch.no_grad():
        module.model.intrinsic_z.normal_(std=0.3)
        module.model.intrinsic_lambdas.uniform_(0.5, 2)
    callback._stepped()
    reference = copy.deepcopy(module.model.state_dict())
    batch = next(iter(Rows("tokens", batch_size=6).train_dataloader()))
    module.terms(batch, {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()}).loss.backward()

    whole = causal(tiny_gpt2(tie_word_embeddings=False))
    whole.model.load_state_dict(reference)
    whole.terms(batch, {name: torch.tensor(float(n)) for name, n in whole.counts(batch).items()}).loss.backward()
    z, lambdas = module.model.intrinsic_z, module.model.intrinsic_lambdas
    of_z, of_lambdas = torch.zeros_like(z), []
    for scale, (_, _, weight, name) in zip(lambdas, _projected(whole.model), strict=True):
        p = PROJECTIONS["fastfood"](len(z), weight.numel(), 2, name)
        of_z += scale * p.transposed(weight.grad.flatten())
        of_lambdas.append((p(z) * weight.grad.flatten()).sum())
    torch.testing.assert_close(z.grad, of_z, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(lambdas.grad, torch.stack(of_lambdas), rtol=1e-3, atol=1e-6)
    # No weight keeps a gradient of its own.
    assert all(p.grad is None for name, p in module.model.named_parameters() if "intrinsic" not in name)
    callback._release()


def test_at_zero_the_network_is_the_base_bit_for_bit():
    module = causal(tiny_llama())
    before = copied(module)
    callback = IntrinsicDimension(64)
    callback._module = module
    callback._begin(module)
    callback._stepped()
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    callback._release()


def test_as_many_numbers_as_weights_span_all_of_them():
    """d = D with a dense projection: any change of the weights is a combination of its columns."""
    p = PROJECTIONS["dense"](24, 24, 0, "w")
    assert int(torch.linalg.matrix_rank(p.matrix)) == 24


def test_a_tasks_head_trains_whole_and_the_optimizer_holds_the_numbers():
    module = classifier()
    before = copied(module)
    callback = IntrinsicDimension(100)
    trainer = fit(module, callback, "classes")
    held = sum(p.numel() for p in trainer.optimizers[0].state)
    head = sum(p.numel() for p in module.model.classifier.parameters())
    assert held == 100 + head
    assert {name for name in before if "classifier" in name} <= trained(module, before)
    module = classifier()
    fit(module, IntrinsicDimension(100, train_head=False), "classes")
    assert not {name for name in trained(module, before) if "classifier" in name}


def test_a_tied_embedding_stays():
    module = causal(tiny_llama(tie=True))
    before = copied(module)
    fit(module, IntrinsicDimension(64))
    assert "model.model.embed_tokens.weight" not in trained(module, before)


def test_checkpointing_of_activations_changes_nothing():
    made = []
    for checkpointing in (False, True):
        module = causal(tiny_llama(), gradient_checkpointing=checkpointing, optimizer="sgd")
        fit(module, IntrinsicDimension(64))
        made.append(copied(module))
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_equals_uninterrupted(step, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = causal(tiny_llama()), causal(tiny_llama())
    fit(whole, None, callbacks=[IntrinsicDimension(64), saving], max_steps=5, enable_checkpointing=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=5, callbacks=[IntrinsicDimension(64)], enable_checkpointing=False, **quiet
    )
    trainer.fit(resumed, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other = causal(tiny_llama())
    with torch.no_grad():
        other.model.lm_head.weight += 1
    trainer = L.Trainer(
        accelerator="cpu", max_steps=5, callbacks=[IntrinsicDimension(64)], enable_checkpointing=False, **quiet
    )
    with pytest.raises(ValueError, match="steps away from another network"):
        trainer.fit(other, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / f"step={step}.ckpt"))


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_a_few_kilobytes_are_the_trained_network(projection, tmp_path):
    module = causal(tiny_llama())
    callback = IntrinsicDimension(64, projection)
    with pytest.raises(ValueError, match="fit first"):
        callback.save(tmp_path / "early")
    fit(module, callback)
    path = callback.save(tmp_path / "numbers.safetensors")
    assert path.stat().st_size < 1024
    rebuilt = tiny_llama()
    apply_intrinsic(rebuilt, path)
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], value, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="steps away from another network"):
        apply_intrinsic(rebuilt, path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no numbers"):
        apply_intrinsic(tiny_llama(), tmp_path / "other")


def test_more_numbers_fit_better():
    """On rows seen again and again, the loss falls the further the more numbers train."""
    losses = []
    for d in (30, 300, 3000):
        module = causal(tiny_llama())
        trainer = fit(module, IntrinsicDimension(d, seed=1), max_steps=40)
        losses.append(float(trainer.callback_metrics["train_loss"]))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"d": 0}, "d=0 must be at least 1"), ({"projection": "sparse"}, "projection='sparse' is not known")],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntrinsicDimension(**arguments)


def test_too_few_numbers_for_the_scalars():
    with pytest.raises(ValueError, match=r"d=10 leaves nothing for z: 20 weights take a scalar each"):
        fit(causal(tiny_llama()), IntrinsicDimension(10))
    fit(causal(tiny_llama()), IntrinsicDimension(10, structure_aware=False))


def test_picture(tmp_path):
    fit(causal(tiny_llama()), IntrinsicDimension(64, picture=True), default_root_dir=tmp_path)
    assert (tmp_path / "intrinsicdimension.png").stat().st_size > 1000


def test_the_projection_goes_where_the_weight_is_from_the_start():
    """A network that is on a GPU before fit: its starting values are there, the projection is drawn on the CPU."""
    owner = torch.nn.Linear(4, 3, device="meta")
    place = _Place(owner, owner, "weight", "weight", PROJECTIONS["fastfood"](5, 12, 0, "weight"), None)
    assert place.ready().signs.device == owner.weight.device
