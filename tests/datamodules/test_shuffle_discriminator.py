"""Shuffle-aware discrimination (paper 104): the frame of synthetic answers against what depends on the question."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_peft.datamodules import ShuffleDiscriminatedData
from lightning_peft.datamodules.shuffle_discriminator import derangement, shuffled, tuned_copy
from lightning_peft.models import CausalLM
from lightning_peft.objectives import ReasoningHighlightedCausalLM
from tests.models.test_causal_lm import batch_of, quiet_trainer
from tests.tiny import tiny_llama, tiny_tokenizer

QUESTIONS, ANSWERS = range(20, 36), range(40, 56)
HEADER, FOOTER = [60, 61, 62], [70, 71]


@pytest.mark.parametrize("n", [2, 3, 64])
def test_the_permutation_has_no_fixed_point(n):
    for seed in range(20):
        made = derangement(n, seed)
        assert sorted(made) == list(range(n))
        assert (made != np.arange(n)).all()
    assert (derangement(64, 1) != derangement(64, 2)).any()
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1, 0)


def test_outputs_are_dealt_to_other_rows_inputs():
    rows = [([10 + i, 20 + i, 30 + i], [-100, 20 + i, 30 + i]) for i in range(5)]
    made = shuffled(rows, seed=3)
    to = derangement(5, 3)
    assert made == [([10 + i, 20 + j, 30 + j], [-100, 20 + j, 30 + j]) for i, j in enumerate(to)]
    assert shuffled(rows, seed=3, max_length=2)[0] == (made[0][0][:2], made[0][1][:2])


def f(question: int) -> list[int]:
    """Two tokens that the question determines."""
    return [ANSWERS[(question * 5) % 16], ANSWERS[(question * 3 + 1) % 16]]


def pretrained():
    """A network that knows f, among noise, and has never seen the frame."""
    network = tiny_llama(hidden=64)
    module = CausalLM(network)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for _ in range(250):
        rows = []
        for question in torch.randint(20, 36, (32,), generator=generator).tolist():
            noise = torch.randint(60, 128, (3,), generator=generator).tolist()
            ids = torch.tensor([question, *noise, *f(question), *noise[:2]])
            labels = torch.full_like(ids, -100)
            labels[4:6] = ids[4:6]
            rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
        _, nll = module.row_losses(batch_of(rows))
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
    assert nll.mean() < 0.1, "the network did not learn f: the test has no ground"
    return network


def framed(n: int = 64) -> list[dict]:
    rows = []
    for i in range(n):
        question = 20 + i % 16
        ids = [question, *HEADER, *f(question), *FOOTER]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


def test_the_frame_is_boilerplate_and_what_the_question_determines_is_reasoning(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "cache"))
    network = pretrained()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()

    def data() -> ShuffleDiscriminatedData:
        return ShuffleDiscriminatedData(
            framed(),
            tokenizer=tiny_tokenizer(),
            batch_size=16,
            shuffle=False,
            shuffled_fraction=0.5,
            shuffled_epochs=8,
            shuffled_learning_rate=5e-3,
        )

    module = ReasoningHighlightedCausalLM(network, tokenizer=tiny_tokenizer())
    trainer = quiet_trainer(tmp_path, max_epochs=0)
    made = data()
    trainer.fit(module, made)
    mask = torch.cat([batch["reasoning_mask"] for batch in made.train_dataloader()])
    expected = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0])
    learnt = slice(1, None)
    for place in range(1, 8):
        right = (mask[:, place] == expected[place]).float().mean()
        assert right > 0.95, f"position {place}: {right:.2f}"
    assert (mask[:, learnt] == expected[learnt]).float().mean() > 0.95
    # nothing of the shuffled copy is left behind
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert made._tuned is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert network.training or not module.training
    # a second run reads what the first one made
    monkeypatch.setattr("lightning_peft.datamodules.shuffle_discriminator.tuned_copy", None)
    again = data()
    quiet_trainer(tmp_path, max_epochs=0).fit(module, again)
    assert torch.equal(torch.cat([batch["reasoning_mask"] for batch in again.train_dataloader()]), mask)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_copy_is_tuned_and_the_network_is_not(rank):
    network = tiny_llama()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = [(row["input_ids"], row["labels"]) for row in framed(16)]
    tuned = tuned_copy(network, rows, epochs=5, learning_rate=1e-2, batch_size=4, lora_rank=rank, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    ids = torch.tensor([rows[0][0]])
    with torch.no_grad():
        first, second = (
            -one.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()
            for one in (network, tuned)
        )
    assert second < first - 0.5
    assert not any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shuffled_fraction": 0.0}, "shuffled_fraction=0.0"),
        ({"shuffled_rows": 1}, "shuffled_rows=1"),
        ({"shuffled_learning_rate": 0.0}, "shuffled_learning_rate=0.0"),
        ({"shuffled_lora_rank": -1}, "shuffled_lora_rank=-1"),
        ({"streaming": True}, "streaming=True"),
        ({"shard_size": 0}, "shard_size=0"),
    ],
)
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ShuffleDiscriminatedData(framed(4), **kwargs)


def test_without_a_network_it_says_so():
    data = ShuffleDiscriminatedData(framed(4), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no network to pass its rows through"):
        data.rows("train")
