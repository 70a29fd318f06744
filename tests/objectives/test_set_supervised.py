"""Set supervised fine-tuning (paper 33): matching by brute force, loss by plain fine-tuning, a toy of two modes."""

from __future__ import annotations

import itertools

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules import LookAheadDataLoader, TraceSetCollator
from lightning_peft.models import CausalLM, ImageClassifier
from lightning_peft.objectives import DynamicFineTuning, SetSupervised, SetSupervisedCausalLM
from lightning_peft.objectives.set_supervised import match_traces
from tests.models.test_causal_lm import counts_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit

TAGS = ["red", "green", "blue"]
IDS = tiny_tokenizer().convert_tokens_to_ids(TAGS)


def module_of(network=None, **kwargs) -> SetSupervisedCausalLM:
    options = {"ssft_tags": TAGS, "tokenizer": tiny_tokenizer(), "learning_rate": 0.05, "optimizer": "sgd"}
    return SetSupervisedCausalLM(network or tiny_llama(), **{**options, **kwargs})


def trace(prompt: list[int], answer: list[int], tag: int = 0) -> dict:
    ids = [*prompt, IDS[tag], *answer]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * (len(prompt) + 1) + answer)}


def questions(n: int = 3, traces: int = 3, seed: int = 0) -> list[dict]:
    """Prompts of several lengths with traces of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(90, 128, (length,), generator=generator).tolist()

    made = []
    for i in range(n):
        prompt = ids(2 + i)
        made.append({"question_id": 7 * i, "traces": [trace(prompt, ids(3 + (i + j) % 4)) for j in range(traces)]})
    return made


def batch_of(rows: list[dict]) -> dict:
    return TraceSetCollator()(rows)


# -- the matching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [1, 2, 3, 4, 5])
def test_the_matching_is_the_best_of_all(tags):
    generator = torch.Generator().manual_seed(tags)
    for traces in range(1, tags + 1):
        costs = torch.rand(tags, traces, generator=generator)
        made = match_traces(costs)
        assert len(set(made.tolist())) == traces
        best = min(
            itertools.permutations(range(tags), traces), key=lambda s: sum(float(costs[i, j]) for j, i in enumerate(s))
        )
        assert made.tolist() == list(best)


def plain_costs(network, rows: list[dict], match_tokens: int) -> torch.Tensor:
    """One forward for each pair of tag and trace, no padding, no batch."""
    costs = torch.zeros(len(TAGS), len(rows))
    for i, tag in enumerate(IDS):
        for j, row in enumerate(rows):
            ids, labels = row["input_ids"].clone(), row["labels"]
            first = int((labels != -100).nonzero()[0])
            ids[first - 1] = tag
            nll = F.cross_entropy(network(ids[None]).logits[0, :-1], labels[1:], reduction="none")
            costs[i, j] = nll[first - 1 :][:match_tokens].mean()
    return costs


@pytest.mark.parametrize("match_tokens", [2, 1000])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_costs_are_those_of_single_forwards(build, match_tokens):
    """In training mode with dropout: the cost knows none, and leaves random numbers and modes as they were."""
    network = build(dropout=0.5)
    module, batch = module_of(network, ssft_match_tokens=match_tokens), batch_of(questions())
    batch = module.transform_batch(batch)
    state, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    costs = module.objectives[0].costs(module, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes
    assert all(modes)
    assert not costs.requires_grad
    rows = [row for question in questions() for row in question["traces"]]
    with torch.no_grad():
        torch.testing.assert_close(costs, plain_costs(network.eval(), rows, match_tokens), rtol=1e-4, atol=1e-5)


def loss_and_gradients(module, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch = module.transform_batch(batch)
    terms = module.terms(batch, counts_of(module, batch))
    module.zero_grad()
    terms.loss.backward()
    return terms.loss.detach(), [p.grad.clone() for p in module.parameters()]


def test_loss_and_gradient_are_those_of_fine_tuning_on_the_matched_pairs():
    module = module_of()
    loss, gradients = loss_and_gradients(module, batch_of(questions()))
    rows = [row for question in questions() for row in question["traces"]]
    with torch.no_grad():
        costs = plain_costs(module.model, rows, 1000)
    matched = torch.cat([match_traces(costs[:, 3 * i : 3 * i + 3]) for i in range(3)])
    for row, tag in zip(rows, matched.tolist()):
        row["input_ids"][int((row["labels"] != -100).nonzero()[0]) - 1] = IDS[tag]
    module.zero_grad()
    total = sum(
        F.cross_entropy(module.model(r["input_ids"][None]).logits[0, :-1], r["labels"][1:], reduction="sum")
        for r in rows
    )
    expected = total / sum(int((row["labels"] != -100).sum()) for row in rows)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for a, p in zip(gradients, module.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)
    assert module.objectives[0].matched.tolist() == torch.bincount(matched, minlength=3).tolist()


def shuffled(rows: list[dict]) -> list[dict]:
    return [{**row, "traces": row["traces"][::-1]} for row in rows[::-1]]


def test_the_order_of_traces_and_questions_changes_nothing():
    one = loss_and_gradients(module_of(), batch_of(questions()))
    other = loss_and_gradients(module_of(), batch_of(shuffled(questions())))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    fixed = [
        loss_and_gradients(module_of(ssft_matching="fixed"), batch_of(rows))[0]
        for rows in (questions(), shuffled(questions()))
    ]
    assert abs(float(fixed[0] - fixed[1])) > 1e-4


def test_fewer_traces_than_tags_and_masked_rows():
    rows = questions(traces=2)
    rows[1]["traces"] = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows[1]["traces"]]
    module = module_of()
    batch = module.transform_batch(batch_of(rows))
    assert module.counts(batch)["loss"] == sum(int((r["labels"] != -100).sum()) for q in rows for r in q["traces"])
    made = module.before_forward(batch)
    for question in made["question_id"].unique():
        own = made["input_ids"][made["question_id"] == question]
        assert len({int(ids[torch.isin(ids, torch.tensor(IDS))]) for ids in own}) == 2
    empty = module.transform_batch(batch_of([rows[1]]))
    assert float(module.terms(empty, counts_of(module, empty)).loss) == 0


def test_the_tag_may_be_learnt():
    module = module_of(ssft_loss_on_tag=True)
    batch = module.transform_batch(batch_of(questions()))
    plain = module_of().transform_batch(batch_of(questions()))
    assert module.counts(batch)["loss"] == module_of().counts(plain)["loss"] + 9
    made = module.before_forward(batch)
    rows, places = torch.arange(9), batch["tag_position"]
    assert torch.equal(made["labels"][rows, places], made["input_ids"][rows, places])
    # The cost is the trace's alone.
    torch.testing.assert_close(module.objectives[0].costs(module, batch), module.objectives[0].costs(module, plain))
    assert (module_of().before_forward(plain)["labels"][rows, places] == -100).all()


def test_random_tags_are_drawn_and_fixed_ones_stand():
    torch.manual_seed(0)
    batch = module_of().transform_batch(batch_of(questions()))
    fixed = module_of(ssft_matching="fixed")
    assert fixed.objectives[0].assigned(fixed, batch).tolist() == [0, 1, 2] * 3
    module = module_of(ssft_matching="random")
    drawn = {tuple(module.objectives[0].assigned(module, batch).tolist()) for _ in range(20)}
    assert len(drawn) > 5
    assert all(sorted(tags[:3]) == [0, 1, 2] for tags in drawn)


# -- training ----------------------------------------------------------------------------------------------------------


def p_of_mode(module, tag: int) -> float:
    """How likely the first mode's token is right behind a tag, of the two."""
    module.eval()
    with torch.no_grad():
        logits = module.model(torch.tensor([[100, 101, IDS[tag]]])).logits[0, -1]
    return float(logits[[60, 70]].softmax(0)[0])


@pytest.mark.parametrize("matching", ["optimal", "random"])
def test_tags_become_ways_of_reasoning(tmp_path, matching):
    """Two modes for each question, in shuffled order: matched, each tag takes one; at random, both stay mixed."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(64):
        modes = [[60, 61, 62], [70, 71, 72]]
        if torch.rand((), generator=generator) < 0.5:
            modes.reverse()
        data.append({"question_id": i, "traces": [trace([100, 101], mode) for mode in modes]})
    torch.manual_seed(0)
    module = module_of(
        ssft_tags=TAGS[:2], ssft_matching=matching, optimizer="adamw", learning_rate=5e-3, lr_scheduler="constant"
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **options
    )
    trainer.fit(module, LookAheadDataLoader(data, batch_size=8, shuffle=True, collate_fn=TraceSetCollator()))
    first, second = p_of_mode(module, 0), p_of_mode(module, 1)
    if matching == "optimal":
        assert abs(first - second) > 0.9
    else:
        assert max(abs(first - 0.5), abs(second - 0.5)) < 0.2
    assert int(module.objectives[0].matched.sum()) == 6 * 128
    again = SetSupervised(TAGS[:2])
    again.load_state_dict(module.objectives[0].state_dict())
    assert torch.equal(again.matched, module.objectives[0].matched)


def test_micro_batches_are_one_batch(tmp_path):
    made = []
    for accumulate in (1, 3):
        module = module_of(lr_scheduler="constant")
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            enable_model_summary=False,
            default_root_dir=tmp_path,
            accumulate_grad_batches=accumulate,
            **options,
        )
        rows = questions(6, traces=2)
        trainer.fit(module, LookAheadDataLoader(rows, batch_size=6 // accumulate, collate_fn=TraceSetCollator()))
        made.append(list(module.parameters()))
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# -- the tags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_tags_are_added_to_tokenizer_and_network(tie):
    modules = []
    for seed in (0, 1):  # whatever random numbers a rank has
        torch.manual_seed(seed)
        modules.append(module_of(tiny_llama(tie=tie), ssft_tags=2, tokenizer=tiny_tokenizer()))
    module = modules[0]
    assert module.tokenizer.tokenize("a <think2> b") == ["a", "<think2>", "b"]
    assert module.objectives[0].ids.tolist() == [128, 129]
    rows, head = module.model.get_input_embeddings().weight, module.model.lm_head.weight
    assert rows.shape[0] == head.shape[0] == module.model.config.vocab_size == 130
    assert (rows is head) == tie
    assert not torch.equal(rows[128], rows[129])
    assert rows.requires_grad
    assert torch.equal(rows, modules[1].model.get_input_embeddings().weight)
    old = tiny_llama(tie=tie)
    assert torch.equal(rows[:128], old.get_input_embeddings().weight)


def test_what_it_needs_is_said():
    for given, message in (
        ({"ssft_tags": 0}, "ssft_tags=0"),
        ({"ssft_tags": ["red", "red"]}, "none twice"),
        ({"ssft_matching": "best"}, "ssft_matching='best'"),
        ({"ssft_match_tokens": 0}, "ssft_match_tokens=0"),
        ({"ssft_tags": 2, "ssft_add_tags": False}, r"no \['<think1>', '<think2>'\]"),
        ({"tokenizer": None}, "looks its tags up in the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            module_of(**given)
    with pytest.raises(ValueError, match="causal language model, and ImageClassifier is none"):
        ImageClassifier(tiny_vit(), objectives=[SetSupervised(TAGS)])
    module = module_of()
    batch = batch_of(questions())
    with pytest.raises(ValueError, match="no question_id"):
        module.transform_batch({key: value for key, value in batch.items() if key != "question_id"})
    with pytest.raises(ValueError, match="has 4 traces and there are 3 tags"):
        module.transform_batch(batch_of(questions(traces=4)))
    untagged = {
        **batch,
        "input_ids": torch.where(torch.isin(batch["input_ids"], torch.tensor(IDS)), 99, batch["input_ids"]),
    }
    with pytest.raises(ValueError, match="none of the tags"):
        module.transform_batch(untagged)
    assert not isinstance(CausalLM(tiny_llama()), SetSupervisedCausalLM)


def test_beside_another_objective_weights_act_on_the_matched_pairs():
    batch = batch_of(questions())
    both = module_of(objectives=[DynamicFineTuning()])
    made = both.transform_batch(batch)
    terms = both.terms(made, counts_of(both, made))
    plain = module_of()
    nll = plain.terms(made, counts_of(plain, made)).units.nll
    torch.testing.assert_close(terms.loss, (torch.exp(-nll) * nll).sum() / len(nll))
