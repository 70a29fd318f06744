"""BitFit: which biases move, which heads, what has none."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.callbacks import BitFit
from lightning_peft.models import SequenceClassifier
from lightning_peft.roles import weights_by_role
from tests.callbacks.test_half_finetuning import causal, copied, fit, trained
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama


def test_biases_and_a_classifier_move_and_nothing_else():
    module = SequenceClassifier(tiny_bert(), lr_scheduler="constant", learning_rate=0.01)
    before = copied(module)
    trainer = fit(module, BitFit(), "classes")
    # A key's bias adds the same to all scores of a query: its gradient is 0 but for rounding.
    may = {name for name in before if name.endswith("bias") or "classifier" in name}
    must = {name for name in may if ".key." not in name}
    assert must <= trained(module, before) <= may
    held = sum(p.numel() for p in trainer.optimizers[0].state)
    assert held == sum(before[name].numel() for name in may)


def test_an_output_matrix_stays_unless_it_is_asked_for():
    for train_head in (None, True):
        module = causal(tiny_gpt2(tie_word_embeddings=False))
        before = copied(module)
        fit(module, BitFit(train_head=train_head))
        assert ("model.lm_head.weight" in trained(module, before)) == bool(train_head)


def test_the_step_is_full_fine_tunings_on_the_biases():
    """With SGD one step of the biases is that of full fine-tuning: their gradients do not depend on what is frozen."""
    steps = []
    for callbacks in ([BitFit()], []):
        module = causal(tiny_gpt2(), optimizer="sgd")
        fit(module, None, callbacks=callbacks, max_steps=1)
        steps.append(module.state_dict())
    for name, value in steps[0].items():
        if name.endswith("bias"):
            torch.testing.assert_close(value, steps[1][name], rtol=0, atol=1e-7)


def test_biases_of_some_roles():
    module = causal(tiny_gpt2())
    before = copied(module)
    fit(module, BitFit(roles=["attention.qkv", "ffn.up"]))
    roles = {w.name: w.role for w in weights_by_role(module) if w.is_bias}
    assert {roles[name] for name in trained(module, before)} == {"attention.qkv", "ffn.up"}


def test_share_of_bert_base():
    """The paper's 0.09 %: of BERT-base's 110 M weights, head aside."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        network = BertModel(BertConfig())
    biases = sum(p.numel() for name, p in network.named_parameters() if name.endswith("bias"))
    assert biases / sum(p.numel() for p in network.parameters()) == pytest.approx(0.0009, abs=5e-5)


def test_refuses_what_has_none_and_roles_that_are_none():
    with pytest.raises(ValueError, match=r"has none, as Llama-style networks do"):
        fit(causal(tiny_llama()), BitFit())
    with pytest.raises(ValueError, match=r"biases of \['router'\] and this network has biases of attention"):
        fit(causal(tiny_gpt2()), BitFit(roles=["router"]))
    with pytest.raises(ValueError, match="roles names 'query', which is no role"):
        BitFit(roles=["query"])
