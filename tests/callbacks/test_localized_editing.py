"""Editing one place: what moves, the loss, steps that are not taken, when it stops, scores, breadth against depth."""

from __future__ import annotations

import random

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_peft.callbacks import EditEvaluation, LocalizedEditing
from lightning_peft.callbacks.localized_editing import sweep_locations
from lightning_peft.datamodules import EditData
from lightning_peft.models import CausalLM
from tests.callbacks.test_half_finetuning import causal, copied, fit, trained
from tests.conformance.data import Rows
from tests.processes import run_on_two
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


# -- the place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layers", "modules", "expected"),
    [
        (tiny_llama, 1, "down_proj", ["layers.1.mlp.down_proj.weight"]),
        (lambda: tiny_llama(layers=12), 1, "down_proj", ["layers.1.mlp.down_proj.weight"]),  # not 10 and 11
        (tiny_llama, [-1], ["q_proj", "ffn.up"], ["layers.1.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"]),
        (tiny_gpt2, 0, "ffn.down", ["h.0.mlp.c_proj.weight", "h.0.mlp.c_proj.bias"]),
    ],
)
def test_only_the_chosen_matrix_moves(make, layers, modules, expected):
    module = causal(make())
    before = copied(module)
    fit(module, LocalizedEditing(layers, modules))
    assert {name.partition(".")[2].partition(".")[2] for name in trained(module, before)} == set(expected)


def test_a_whole_block():
    module = causal(tiny_llama())
    before = copied(module)
    fit(module, LocalizedEditing(0, "block"))
    assert trained(module, before) == {name for name in before if ".layers.0." in name}


@pytest.mark.parametrize(
    ("layers", "modules", "message"),
    [
        (2, "down_proj", r"layers names 'block:2'.*block:0 to 1"),
        (0, "down", r"modules names 'down'.*did you mean .*down_proj"),
        ([], "down_proj", "name at least one block"),
    ],
)
def test_places_that_are_not_there(layers, modules, message):
    with pytest.raises(ValueError, match=message):
        fit(causal(tiny_llama()), LocalizedEditing(layers, modules))


def test_a_negative_floor():
    with pytest.raises(ValueError, match="loss_floor=-1"):
        LocalizedEditing(0, loss_floor=-1)


# -- the loss ---------------------------------------------------------------------------------------------------------


def mean_of_means(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    counts = (labels != -100).sum(1)
    return (nll.sum(1) / counts.clamp(min=1))[counts > 0].mean()


def uneven(n: int) -> list[dict[str, torch.Tensor]]:
    """Rows with 1 to 6 learnt tokens; one with none."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number in range(n):
        ids = torch.randint(5, 128, (9,), generator=generator)
        labels = ids.clone()
        labels[: 9 - (number % 7)] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_the_mean_over_an_edits_tokens_and_then_over_edits(accumulate):
    """And so is its gradient, over micro-batches too."""
    from lightning_peft.datamodules import LookAheadDataLoader

    module = causal(tiny_llama(), optimizer="sgd", weight_decay=0.0)
    reference = tiny_llama()
    callback = LocalizedEditing(1)
    loader = LookAheadDataLoader(uneven(12), batch_size=12 // accumulate)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulate, callbacks=[callback], **QUIET
    )
    trainer.fit(module, loader)
    whole = torch.utils.data.default_collate(uneven(12))
    loss = mean_of_means(reference, whole)
    weight = reference.model.layers[1].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = weight.detach() - 0.01 * gradient
    torch.testing.assert_close(module.model.model.layers[1].mlp.down_proj.weight.detach(), expected, rtol=0, atol=1e-6)
    assert not module.objectives  # taken out again


def on_two(rank: int) -> torch.Tensor:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_peft.datamodules import LookAheadDataLoader

    module = causal(tiny_llama(), optimizer="sgd", weight_decay=0.0)
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [LocalizedEditing(1)]
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, callbacks=callbacks, **QUIET)
    trainer.fit(module, LookAheadDataLoader(uneven(12), batch_size=6))
    return module.model.model.layers[1].mlp.down_proj.weight.detach()


def test_ranks_with_other_lengths_take_the_same_step():
    first, second = run_on_two(on_two)
    reference = tiny_llama()
    weight = reference.model.layers[1].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(mean_of_means(reference, torch.utils.data.default_collate(uneven(12))), weight)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weight.detach() - 0.01 * gradient, rtol=0, atol=1e-6)


# -- steps that are not taken -----------------------------------------------------------------------------------------


def test_a_step_below_the_floor_moves_nothing():
    """Neither weights nor moments, under Adam with weight decay."""
    module = causal(tiny_llama(), weight_decay=0.5)
    before = copied(module)
    callback = LocalizedEditing(1, loss_floor=100.0)
    trainer = fit(module, callback, max_steps=3)
    assert not trained(module, before)
    assert callback.skipped == 3
    assert not trainer.optimizers[0].state
    assert trainer.global_step == 3


def test_a_floor_of_zero_changes_nothing():
    made = []
    for floor in (0.0, 1e-9):
        module = causal(tiny_llama())
        fit(module, LocalizedEditing(1, loss_floor=floor))
        made.append(copied(module))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_it_stops_when_an_epoch_is_learnt():
    rows = [{"prompt": "a b", "target_new": "c"}, {"prompt": "d e", "target_new": "f"}]
    module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer(), learning_rate=0.02, lr_scheduler="constant")
    with torch.no_grad():
        module.model.lm_head.weight.mul_(30)  # so small a one could not be sure of anything
    callback = LocalizedEditing([0, 1], "block")
    trainer = L.Trainer(accelerator="cpu", max_epochs=200, callbacks=[callback], **QUIET)
    trainer.fit(module, EditData(rows, tokenizer=tiny_tokenizer()))
    assert 1 < trainer.current_epoch < 200
    batch = next(iter(EditData(rows, tokenizer=tiny_tokenizer()).train_dataloader()))
    assert float(mean_of_means(module.model.eval(), batch)) < 0.01


def test_resumed_equals_uninterrupted(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = causal(tiny_llama()), causal(tiny_llama())
    first = LocalizedEditing(1, loss_floor=4.0)
    fit(whole, None, callbacks=[first, saving], max_steps=6, enable_checkpointing=True)
    second = LocalizedEditing(1, loss_floor=4.0)
    trainer = L.Trainer(accelerator="cpu", max_steps=6, callbacks=[second], **QUIET)
    trainer.fit(resumed, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert first.skipped == second.skipped


# -- scores -----------------------------------------------------------------------------------------------------------


WORDS = [f"w{i}" for i in range(20)]


def facts(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Subjects of two words with a word as their fact, asked in two ways; and subjects that are not to change."""
    drawn = random.Random(seed)
    subjects = drawn.sample([(a, b) for a in "abcdefghijklmno" for b in "pqrstuvwxyz"], 2 * n)
    return [
        {
            "prompt": f"question {a} {b} answer",
            "rephrase": f"hello {a} {b} answer",
            "locality": f"question {c} {d} answer",
            "target_new": drawn.choice(WORDS),
        }
        for (a, b), (c, d) in zip(subjects[:n], subjects[n:])
    ]


def test_without_an_edit_locality_is_one_and_scores_are_a_hand_count():
    module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer()).eval()
    edits = facts(6)
    evaluation = EditEvaluation(edits, max_new_tokens=3)
    said = evaluation.answers(module, "prompt")
    edits[0]["target_new"], edits[1]["target_new"] = f"The {said[0]}!", said[1].upper()
    del edits[5]["rephrase"], edits[4]["locality"]
    evaluation = EditEvaluation(edits, max_new_tokens=3)
    trainer = L.Trainer(accelerator="cpu", callbacks=[evaluation], **QUIET)
    logged = trainer.test(module, Rows("tokens", batch_size=6), verbose=False)[0]
    right = sum(a == b for a, b in zip(said, [said[0], said[1], *(row["target_new"] for row in edits[2:])]))
    assert right >= 2
    assert logged["test_reliability"] == pytest.approx(right / 6)
    assert logged["test_locality"] == 1.0
    rephrased = evaluation.answers(module, "rephrase")
    assert rephrased[5] is None
    assert logged["test_generalisation"] == pytest.approx(
        sum(a == b for a, b in zip(rephrased[:5], [said[0], said[1].upper(), *(r["target_new"] for r in edits[2:5])]))
        / 5
    )


def known_network(seed: int, epochs: int = 80) -> CausalLM:
    """A network that knows facts already, some of which are to be changed."""
    L.seed_everything(seed, verbose=False)
    old = facts(60, seed)
    taught = [
        row for r in old for row in (r, {**r, "prompt": r["rephrase"]}, {"prompt": r["locality"], "target_new": "yes"})
    ]
    module = CausalLM(tiny_llama(hidden=64), tokenizer=tiny_tokenizer(), learning_rate=3e-3, lr_scheduler="constant")
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, **QUIET)
    trainer.fit(module, EditData(taught, tokenizer=tiny_tokenizer(), batch_size=20))
    return module


def test_breadth_first_keeps_what_depth_first_loses():
    """The paper's claim: one by one to convergence, later edits undo earlier ones and disturb what is unrelated."""
    base = known_network(0)
    edits = facts(60, 0)[:24]
    drawn = random.Random(9)
    for row in edits:
        row["target_new"] = drawn.choice([word for word in WORDS if word != row["target_new"]])
    found = {}
    for order in ("breadth", "depth"):
        module = CausalLM(
            tiny_llama(hidden=64),
            tokenizer=tiny_tokenizer(),
            learning_rate=3e-3,
            lr_scheduler="constant",
            weight_decay=0.0,
        )
        module.load_state_dict(base.state_dict())
        data = EditData(edits, tokenizer=tiny_tokenizer(), order=order, batch_size=8)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=80 if order == "breadth" else 1,
            callbacks=[LocalizedEditing(0, "ffn")],
            **QUIET,
        )
        trainer.fit(module, data)
        found[order] = EditEvaluation(edits, max_new_tokens=3).compare(module, base)
    assert found["breadth"]["reliability"] >= 0.95
    assert found["depth"]["reliability"] < 0.8
    assert found["breadth"]["locality"] > found["depth"]["locality"] + 0.2


def test_the_sweep_tells_what_each_place_gives(capsys):
    edits = facts(4)
    rows = sweep_locations(
        lambda: CausalLM(tiny_llama(), tokenizer=tiny_tokenizer(), learning_rate=0.02, lr_scheduler="constant"),
        EditData(edits, tokenizer=tiny_tokenizer()),
        EditEvaluation(edits, max_new_tokens=3).compare,
        layers=[0, 1],
        modules=["down_proj", "block"],
        accelerator="cpu",
        max_epochs=30,
        enable_progress_bar=False,
    )
    assert {(row["layer"], row["module"]) for row in rows} == {(n, m) for n in (0, 1) for m in ("down_proj", "block")}
    assert set(rows[0]) == {"layer", "module", "reliability", "generalisation", "locality"}
    sums = [row["reliability"] + row["generalisation"] + row["locality"] for row in rows]
    assert sums == sorted(sums, reverse=True)
    assert max(row["reliability"] for row in rows) == 1.0


def test_a_module_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="EditEvaluation writes text"):
        fit(causal(tiny_llama()), None, callbacks=[EditEvaluation(facts(2))])
