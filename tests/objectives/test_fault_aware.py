"""Fault-aware fine-tuning (paper 94) against the weighted sum by hand, pair by pair, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_peft.datamodules import FaultPairs
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.datamodules.standard_library import standard_library_functions
from lightning_peft.models import CausalLM
from lightning_peft.objectives import FaultAware, FaultAwareCausalLM
from lightning_peft.objectives.fault_aware import importance
from tests.conformance.data import make_row
from tests.models.test_causal_lm import batch_of, counts_of, gradients, quiet_trainer
from tests.tiny import tiny_llama


def pairs(n: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [make_row("faults", generator, number) for number in range(n)]


def peaked(**kwargs):
    network = tiny_llama(**kwargs)
    torch.manual_seed(3)
    torch.nn.init.normal_(network.lm_head.weight, std=0.4)
    return network


def nll_of(network, ids, mask) -> torch.Tensor:
    """-log p of every token but the first, [batch, time], 0 there, from whole logits."""
    log_p = network(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return torch.nn.functional.pad(-log_p.gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))


def expected_loss(network, batch, alpha: float, tau: float) -> tuple[torch.Tensor, list[float]]:
    """The equation, one pair at a time."""
    nll = nll_of(network, batch["input_ids"], batch["attention_mask"])
    wrong = nll_of(network, batch["wrong_input_ids"], batch["wrong_attention_mask"])
    total, omegas = nll.new_zeros(()), []
    learnt = batch["labels"] != -100
    learnt[:, 0] = False
    for row in range(len(nll)):
        fault = batch["fault_mask"][row].bool() & learnt[row]
        other = batch["wrong_fault_mask"][row].bool()
        other[0] = False
        omega = 1.0
        if fault.any() and other.any():
            margin = nll[row][fault].mean().item() - wrong[row][other].mean().item()
            omega = 1 + alpha / (1 + math.exp(-margin / tau))
        omegas.append(omega)
        total = total + (nll[row] * learnt[row] * torch.where(fault, omega, 1.0)).sum()
    return total / learnt.sum(), omegas


@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (3.0, 0.2)])
def test_loss_and_gradient_are_those_of_the_equation(frozen_head, alpha, tau):
    network, batch = peaked(), batch_of(pairs())
    network.lm_head.requires_grad_(not frozen_head)
    module = FaultAwareCausalLM(network, fait_alpha=alpha, fait_tau=tau)
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    loss, omegas = expected_loss(exact, batch, alpha, tau)
    loss.backward()
    assert min(omegas) == 1 < max(omegas)  # pairs with and without a fault
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-7)
    for name, grad in gradients(network).items():
        torch.testing.assert_close(grad.double(), gradients(exact)[name], rtol=1e-4, atol=1e-6)
    assert not terms.weights.requires_grad


def test_importance_falls_from_one_plus_alpha_to_one_as_the_pair_separates():
    margin = torch.linspace(-20, 20, 41, dtype=torch.float64)  # nll of the correct segment less that of the wrong
    omega = importance(margin, torch.zeros_like(margin), alpha=2.0, tau=1.0)
    assert omega.diff().min() > 0
    assert omega[0] == pytest.approx(1.0, abs=1e-6)
    assert omega[20] == 2.0
    assert omega[-1] == pytest.approx(3.0, abs=1e-6)


def test_alpha_of_zero_is_plain_fine_tuning_bit_for_bit(tmp_path):
    def trained(objectives):
        torch.manual_seed(0)
        module = CausalLM(tiny_llama(dropout=0.1), objectives=objectives, learning_rate=1e-2)
        loader = LookAheadDataLoader(pairs(), batch_size=4, shuffle=False, collate_fn=batch_of)
        quiet_trainer(tmp_path, max_epochs=2).fit(module, loader)
        return list(module.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained([]), trained([FaultAware(fait_alpha=0.0)])))


def test_pairs_without_a_fault_weigh_one():
    module, batch = FaultAwareCausalLM(peaked()), batch_of(pairs())
    batch["wrong_fault_mask"] = torch.zeros_like(batch["wrong_fault_mask"])
    assert module.terms(batch, counts_of(module, batch)).weights.eq(1).all()
    batch["fault_mask"] = torch.zeros_like(batch["fault_mask"])
    assert module.terms(batch, counts_of(module, batch)).weights.eq(1).all()


def test_the_wrong_pass_leaves_mixed_precision_its_gradients():
    """A pass without gradient before the step must not leave casts of weights that have none."""
    module, batch = FaultAwareCausalLM(peaked()), batch_of(pairs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.terms(batch, counts_of(module, batch)).loss.backward()
    found = gradients(module.model)
    module.model.zero_grad()
    module.terms(batch, counts_of(module, batch)).loss.backward()
    assert found.keys() == gradients(module.model).keys()
    for name, grad in gradients(module.model).items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0) > 0.98, name


def test_training_without_pairs_is_refused_and_evaluation_is_plain():
    module, batch = FaultAwareCausalLM(tiny_llama()), batch_of(pairs())
    bare = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
    with pytest.raises(ValueError, match=r"datamodules\.FaultPairs"):
        module.terms(bare, counts_of(module, bare))
    terms = module.eval().terms(bare, counts_of(module, bare))
    assert terms.weights.eq(1).all()


@pytest.mark.parametrize(("kwargs", "message"), [({"fait_alpha": -1.0}, "fait_alpha"), ({"fait_tau": 0.0}, "fait_tau")])
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FaultAwareCausalLM(tiny_llama(), **kwargs)


def byte_tokenizer():
    """A fast tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def margin(network, loader) -> float:
    """Mean nll of the wrong segments less that of the correct ones, over pairs."""
    found = []
    with torch.no_grad():
        for batch in loader:
            sides = []
            for prefix in ("", "wrong_"):
                nll = nll_of(network, batch[prefix + "input_ids"], batch[prefix + "attention_mask"])
                mask = batch[prefix + "fault_mask"]
                sides.append((nll * mask).sum(1) / mask.sum(1))
            found.append(sides[1] - sides[0])
    return torch.cat(found).mean().item()


def test_on_mutated_functions_the_margin_grows_faster_than_with_plain_fine_tuning(tmp_path):
    short = [row for row in standard_library_functions() if len(row["prompt"]) + len(row["completion"]) < 260][:48]
    tokenizer = byte_tokenizer()
    data = FaultPairs(
        [{"prompt": row["prompt"], "completion": row["completion"]} for row in short],
        tokenizer=tokenizer,
        max_length=264,
        batch_size=8,
    )
    margins = {}
    for alpha in (0.0, 8.0):
        network = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, hidden=64)
        module = FaultAwareCausalLM(network, tokenizer=tokenizer, fait_alpha=alpha, learning_rate=5e-3)
        before = margin(network, data.train_dataloader())
        quiet_trainer(tmp_path, max_epochs=8, limit_val_batches=0).fit(module, data)
        margins[alpha] = margin(network.eval(), data.train_dataloader()) - before
    assert margins[8.0] > margins[0.0] + 0.1, margins
    assert margins[8.0] > 0
