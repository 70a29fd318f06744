"""Reasoning-highlighted fine-tuning (paper 104) against two means and a softmax by hand, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_peft.datamodules import InstructionData
from lightning_peft.objectives import ConceptAwareFineTuning, ReasoningHighlighted, ReasoningHighlightedCausalLM
from lightning_peft.objectives.reasoning_highlighted import reasoning_weights
from tests.conformance.data import make_row
from tests.models.test_causal_lm import batch_of, counts_of, gradients, quiet_trainer
from tests.objectives.test_fault_aware import nll_of, peaked
from tests.processes import run_on_two
from tests.tiny import tiny_llama, tiny_tokenizer


def reasoning_rows(n: int = 10) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [make_row("reasoning", generator, number) for number in range(n)]


def expected_loss(network, batch, scope="sample", tau=2.0, reduction="mean", fixed=None) -> torch.Tensor:
    """L = w_b L_b + w_r L_r of each scope; scopes count by their tokens."""
    nll = nll_of(network, batch["input_ids"], batch["attention_mask"])
    learnt = batch["labels"] != -100
    learnt[:, 0] = False
    reasoning = batch["reasoning_mask"].bool()
    rows = [[row] for row in range(len(nll))] if scope == "sample" else [list(range(len(nll)))]
    total = nll.new_zeros(())
    for part in rows:
        groups = [nll[part][learnt[part] & (reasoning[part] == kind)] for kind in (False, True)]
        present = [group for group in groups if len(group)]
        losses = [group.mean() if reduction == "mean" else group.sum() for group in present]
        exps = [math.exp(loss.item() / tau) for loss in losses]
        w = [e / sum(exps) for e in exps] if fixed is None or len(present) < 2 else [1 - fixed, fixed]
        loss = sum(a * b for a, b in zip(w, losses))
        total = total + loss * (sum(len(group) for group in present) if reduction == "mean" else 1)
    return total / learnt.sum()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"scope": "micro_batch", "tau": 0.5},
        {"scope": "step"},  # of one batch: the same
        {"reduction": "sum", "tau": 20.0},
        {"fixed": 0.8},
        {"tau": 0.05},  # nearly all weight on the harder group
    ],
)
@pytest.mark.parametrize("frozen_head", [True, False])
def test_loss_and_gradient_are_those_of_the_equation(kwargs, frozen_head):
    network, batch = peaked(), batch_of(reasoning_rows())
    network.lm_head.requires_grad_(not frozen_head)
    names = {"scope": "rft_scope", "tau": "rft_tau", "reduction": "rft_reduction", "fixed": "rft_reasoning_weight"}
    module = ReasoningHighlightedCausalLM(network, **{names[key]: value for key, value in kwargs.items()})
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    loss = expected_loss(exact, batch, **kwargs)
    loss.backward()
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-7)
    for name, grad in gradients(network).items():
        torch.testing.assert_close(grad.double(), gradients(exact)[name], rtol=1e-4, atol=1e-6)
    assert not terms.weights.requires_grad


def test_equal_losses_give_the_plain_mean_of_the_two():
    weights = reasoning_weights(torch.tensor([[6.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5 * 4 / 3, 0.5 * 4 / 1]]))


def test_an_empty_group_leaves_weight_one_to_the_other():
    sums, counts = (
        torch.tensor([[6.0, 0.0], [0.0, 5.0], [0.0, 0.0]]),
        torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
    )
    for fixed in (None, 0.9):
        weights = reasoning_weights(sums, counts, reasoning_weight=fixed)
        assert weights[0, 0] == weights[1, 1] == 1
        assert torch.isfinite(weights).all()


def test_an_infinite_temperature_gives_halves():
    weights = reasoning_weights(torch.tensor([[30.0, 2.0]]), torch.tensor([[3.0, 1.0]]), tau=float("inf"))
    torch.testing.assert_close(weights, torch.tensor([[0.5 * 4 / 3, 0.5 * 4 / 1]]))


def test_group_losses_do_not_see_the_rows_of_auxiliary_heads():
    network, batch = peaked(num_hidden_layers=3), batch_of(reasoning_rows())
    plain = ReasoningHighlightedCausalLM(copy.deepcopy(network))
    expected = plain.terms(batch, counts_of(plain, batch)).weights
    heads = ConceptAwareFineTuning(3, heads_init="copy", heads_schedule="constant")
    module = ReasoningHighlightedCausalLM(network, objectives=[heads])
    torch.testing.assert_close(module.terms(batch, counts_of(module, batch)).weights, expected)


def test_packed_documents_are_samples_of_their_own():
    from lightning_peft.datamodules.collate import collate
    from lightning_peft.datamodules.packing import packed_row

    network = peaked().eval()
    documents = [{k: v.numpy() for k, v in row.items() if k != "attention_mask"} for row in reasoning_rows(5)]
    documents = [{k: v[: 4 + i] for k, v in row.items()} for i, row in enumerate(documents)]
    packed = collate(
        [packed_row(documents[:3], ["reasoning_mask"]), packed_row(documents[3:], ["reasoning_mask"])],
        pad_token_id=0,
        token_columns=["reasoning_mask"],
    )
    module = ReasoningHighlightedCausalLM(network)
    together = module.terms(packed, counts_of(module, packed))
    apart = collate(documents, pad_token_id=0, token_columns=["reasoning_mask"])
    torch.testing.assert_close(together.loss, expected_loss(network, apart), rtol=1e-5, atol=1e-6)


def mask_of(ids: list[int]) -> list[int]:
    return [int(i % 2) for i in ids]


@pytest.mark.parametrize("packing", [False, True])
def test_the_mask_survives_packing_and_truncation(packing):
    tokenizer = tiny_tokenizer()
    rows = []
    for i in range(6):
        ids = [5 + (i * 7 + t * 3) % 100 for t in range(4 + i)]
        rows.append({"input_ids": ids, "labels": ids, "reasoning_mask": mask_of(ids)})
    data = InstructionData(
        rows, tokenizer=tokenizer, max_length=7, packing=packing, token_columns=["reasoning_mask"], batch_size=2
    )
    seen = 0
    for batch in data.train_dataloader():
        assert batch["reasoning_mask"].shape == batch["labels"].shape
        real = batch["document_ids"] >= 0 if packing else batch["attention_mask"].bool()
        assert torch.equal(batch["reasoning_mask"][real], batch["input_ids"][real] % 2)
        assert not batch["reasoning_mask"][~real].any()
        seen += int(real.sum())
    assert seen == sum(min(4 + i, 7) for i in range(6))


@pytest.mark.parametrize("length", [3, 8])
def test_a_mask_of_another_length_is_refused(length):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "reasoning_mask": [1] * length}]
    data = InstructionData(rows, tokenizer=tiny_tokenizer(), token_columns=["reasoning_mask"])
    with pytest.raises(ValueError, match=f"reasoning_mask has {length} values for a row of 4 tokens"):
        data.rows("train")
    module, batch = ReasoningHighlightedCausalLM(tiny_llama()), batch_of(reasoning_rows())
    batch["reasoning_mask"] = batch["reasoning_mask"][:, :-1]
    with pytest.raises(ValueError, match="reasoning_mask has shape"):
        module.terms(batch, counts_of(module, batch))


def test_training_without_a_mask_is_refused_and_evaluation_is_plain():
    module, batch = ReasoningHighlightedCausalLM(tiny_llama()), batch_of(reasoning_rows())
    del batch["reasoning_mask"]
    with pytest.raises(ValueError, match=r"datamodules\.ShuffleDiscriminatedData"):
        module.terms(batch, counts_of(module, batch))
    assert module.eval().terms(batch, counts_of(module, batch)).weights.eq(1).all()


def step_scope(rank: int, folder: str) -> list[torch.Tensor]:
    """Rank 1 has not one label in the second step."""
    return _trained(folder, rows=reasoning_rows(12), batch_size=3, devices=2)


def _trained(folder, rows, batch_size, devices=1) -> list[torch.Tensor]:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_peft.datamodules import LookAheadDataLoader

    for row in (7, 9, 11):  # what rank 1 sees in its second batch
        rows[row]["labels"][:] = -100
    module = ReasoningHighlightedCausalLM(
        peaked(), rft_scope="step", rft_tau=0.5, optimizer="sgd", learning_rate=0.1, lr_scheduler="constant"
    )
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if devices == 2 else {}
    trainer = quiet_trainer(folder, max_epochs=1, **strategy)
    trainer.fit(module, LookAheadDataLoader(rows, batch_size=batch_size, shuffle=False, collate_fn=batch_of))
    return [p.detach() for p in module.parameters()]


def test_the_scope_of_a_step_covers_all_ranks(tmp_path):
    first, second = run_on_two(step_scope, str(tmp_path))
    one = _trained(tmp_path, reasoning_rows(12), 6)
    for a, b, expected in zip(first, second, one):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=0, atol=1e-6)


def test_the_scope_of_a_step_refuses_accumulation(tmp_path):
    from lightning_peft.datamodules import LookAheadDataLoader

    module = ReasoningHighlightedCausalLM(tiny_llama(), rft_scope="step")
    loader = LookAheadDataLoader(reasoning_rows(), batch_size=2, collate_fn=batch_of)
    with pytest.raises(ValueError, match=r"rft_scope='step'.*accumulate_grad_batches=2"):
        quiet_trainer(tmp_path, max_steps=1, accumulate_grad_batches=2).fit(module, loader)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rft_tau": 0.0}, "rft_tau=0.0"),
        ({"rft_scope": "batch"}, "rft_scope='batch'"),
        ({"rft_reduction": "max"}, "rft_reduction='max'"),
        ({"rft_reasoning_weight": 2.0}, "rft_reasoning_weight=2.0"),
    ],
)
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ReasoningHighlighted(**kwargs)
