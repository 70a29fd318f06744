"""Dynamic fine-tuning (paper 93) against -sum p / M in float64 and against TRL's `loss_type="dft"`."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.objectives import DynamicFineTuning, DynamicFineTuningCausalLM, DynamicFineTuningMixin
from lightning_peft.objectives.dynamic_fine_tuning import dynamic_fine_tuning_weights
from tests.models.test_causal_lm import batch_of, counts_of, gradients, quiet_trainer, rows
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer


def probabilities(network, batch) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """p of every target and whether it is learnt, [batch, time - 1], from whole logits of a copy in float64."""
    network = copy.deepcopy(network).double()
    network.zero_grad()
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    p = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return p, labels != -100, network


def peaked(build, **kwargs):
    """A network whose probabilities are not all near one over the vocabulary."""
    network = build(**kwargs)
    torch.manual_seed(3)
    torch.nn.init.normal_(network.get_output_embeddings().weight, std=0.4)
    return network


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_gradient_is_that_of_minus_the_sum_of_probabilities(build, frozen_head):
    network = peaked(build)
    network.get_output_embeddings().weight.requires_grad_(not frozen_head)
    module, batch = DynamicFineTuningCausalLM(network), batch_of(rows(4))
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    p, learnt, exact = probabilities(network, batch)
    assert p[learnt].max() > 10 * p[learnt].median()
    (-(p * learnt).sum() / learnt.sum()).backward()
    for name, grad in gradients(network).items():
        torch.testing.assert_close(grad.double(), gradients(exact)[name], rtol=1e-4, atol=1e-6)
    expected = (-(p * p.log()) * learnt).sum() / learnt.sum()
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-8)
    # the plain cross-entropy beside it
    assert terms.sums["nll"] / terms.counts["nll"] == pytest.approx((-p.log())[learnt].mean().item(), rel=1e-5)


def test_a_weight_that_is_not_constant_has_another_gradient():
    network, batch = peaked(tiny_llama), batch_of(rows(3))
    p, learnt, exact = probabilities(network, batch)
    (-(p * p.log()) * learnt).sum().div(learnt.sum()).backward()
    wrong = gradients(exact)["lm_head.weight"]
    module = DynamicFineTuningCausalLM(network)
    module.terms(batch, counts_of(module, batch)).loss.backward()
    assert not torch.allclose(gradients(network)["lm_head.weight"].double(), wrong, rtol=1e-2)


def test_weights_are_constants_between_the_floor_and_one():
    nll = torch.tensor([0.0, 0.5, 80.0, 1e4], requires_grad=True)
    for floor in (0.0, 0.1, 1.0):
        weights = dynamic_fine_tuning_weights(nll, floor)
        assert not weights.requires_grad
        torch.testing.assert_close(
            weights.double(), nll.double().neg().exp().clamp(min=floor).detach(), rtol=1e-6, atol=0
        )
        assert weights.min() >= floor
        assert weights.max() <= 1
    assert dynamic_fine_tuning_weights(nll, 1.0).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_impossible_tokens_give_neither_nan_nor_gradient(dtype):
    network = tiny_llama()
    torch.nn.init.normal_(network.lm_head.weight, std=30.0)  # nll far above 80
    module, batch = DynamicFineTuningCausalLM(network.to(dtype)), batch_of(rows(4))
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    assert terms.units.nll.max() > 80
    assert torch.isfinite(terms.loss)
    assert all(torch.isfinite(grad).all() for grad in gradients(network).values())


def test_a_floor_of_one_is_plain_cross_entropy(tmp_path):
    losses = []
    for objectives in ([], [DynamicFineTuning(dft_floor=1.0)]):
        module = CausalLM(tiny_llama(), objectives=objectives)
        batch = batch_of(rows(4))
        terms = module.terms(batch, counts_of(module, batch))
        terms.loss.backward()
        losses.append((terms.loss.detach(), gradients(module.model)))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1].values(), losses[1][1].values()))


def test_a_certain_token_costs_what_cross_entropy_has_it_cost():
    """p = 1: the weight is 1, and loss and gradient are those of cross-entropy (both vanish)."""
    nll = torch.tensor([1e-7], requires_grad=True)
    (dynamic_fine_tuning_weights(nll) * nll).sum().backward()
    assert nll.grad.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_two_micro_batches_of_other_lengths_are_one_batch(floor, tmp_path):
    def trained(batch_size, accumulate):
        module = DynamicFineTuningCausalLM(
            peaked(tiny_llama), dft_floor=floor, optimizer="sgd", learning_rate=0.5, lr_scheduler="constant"
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate)
        trainer.fit(module, LookAheadDataLoader(rows(12), batch_size=batch_size, shuffle=False, collate_fn=batch_of))
        return [p.detach() for p in module.parameters()]

    for a, b in zip(trained(12, 1), trained(4, 3)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_classifier_weights_its_examples():
    class Classifier(DynamicFineTuningMixin, SequenceClassifier):
        pass

    module, batch = Classifier(tiny_bert()), batch_of(rows(6))
    batch["labels"] = torch.tensor([0, 1, -100, 1, 0, 1])
    terms = module.terms(batch, counts_of(module, batch))
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits.log_softmax(-1)[batch["labels"] >= 0].gather(1, batch["labels"][batch["labels"] >= 0][:, None])
    torch.testing.assert_close(terms.loss, -(log_p.exp() * log_p).mean(), rtol=1e-5, atol=1e-7)


def test_loss_and_gradients_equal_trls(tmp_path):
    import datasets
    from trl.trainer.sft_trainer import SFTConfig, SFTTrainer

    ours = peaked(tiny_llama)
    theirs = copy.deepcopy(ours)
    config = SFTConfig(
        str(tmp_path), loss_type="dft", use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
    )
    data = datasets.Dataset.from_dict({"text": ["a b c", "d e f"]})
    trainer = SFTTrainer(theirs, args=config, train_dataset=data, processing_class=tiny_tokenizer())
    batch = batch_of(rows(5))
    batch["labels"][:, 0] = -100
    learnt = (batch["labels"] != -100).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=learnt)
    loss.backward()
    module = DynamicFineTuningCausalLM(ours)
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    torch.testing.assert_close(terms.loss, loss, rtol=0, atol=1e-6)
    assert loss > 0.01
    expected = gradients(theirs)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_floor_out_of_range_names_itself(floor):
    with pytest.raises(ValueError, match=rf"dft_floor={floor}"):
        DynamicFineTuningCausalLM(tiny_llama(), dft_floor=floor)
