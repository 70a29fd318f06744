"""Rewritings: decided by row, seed and epoch alone, in any order, worker and run; and only where they belong."""

import os
import pickle
import signal

import datasets
import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.callbacks import RandomState
from lightning_peft.datamodules.chat_template import tokenize_parts, tokenize_prompt_completion
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex
from lightning_peft.datamodules.rewriting import (
    EpochRows,
    EpochSampler,
    Rewriting,
    RewrittenData,
    exchanges,
    leading_tokens,
    with_exchanges,
)
from lightning_peft.datamodules.tokenized import tokenize_row
from lightning_peft.models import CausalLM
from tests.datamodules.subwords import subword_tokenizer
from tests.processes import call_in_child
from tests.tiny import tiny_gpt2, tiny_tokenizer

WORDS = list("abcdefghijkl")
ROWS = [{"prompt": f"{word} ", "completion": " ".join(WORDS[: n % 5 + 1])} for n, word in enumerate(WORDS)]


class Answering(Rewriting):
    """Puts a drawn word in front of the answer."""

    def __init__(self, words=("yes", "no", "maybe", "red", "green", "blue"), seed=0):
        self.words, self.seed = list(words), seed

    def rewrite(self, row, epoch):
        word = self.draws(epoch, row["prompt"]).choice(self.words)
        return {"prompt": row["prompt"], "completion": f"{word} {row['completion']}"}


class AnsweringData(RewrittenData):
    def rewriting(self, split):
        return Answering(seed=self.seed) if split == "train" else None


def words(rows):
    return {row["prompt"]: row["completion"].split()[0] for row in rows}


def test_the_order_of_the_rows_changes_nothing_and_seed_and_epoch_do():
    rows = datasets.Dataset.from_list(ROWS)
    own = words(rows.map(Answering()))
    assert words(rows.shuffle(seed=1).map(Answering())) == own
    assert words(rows.map(pickle.loads(pickle.dumps(Answering())), num_proc=2)) == own
    assert words(Answering()(row) for row in ROWS) == own
    assert words(rows.map(Answering(seed=1))) != own
    later = words(rows.map(Answering(), fn_kwargs={"epoch": 1}))
    assert later != own
    assert later == words(Answering()(row, 1) for row in ROWS)
    assert set(own.values()) | set(later.values()) == set(Answering().words)


def test_rewriting_twice_is_refused_and_columns_are_carried():
    once = Answering()({**ROWS[0], "weight": 2.0, "text": "left out"})
    assert once == {**once, "weight": 2.0, "rewritten": ["Answering"]}
    assert set(once) == {"prompt", "completion", "weight", "rewritten"}
    with pytest.raises(ValueError, match="Answering is applied twice: the row has been through Answering"):
        Answering()(once)
    with pytest.raises(ValueError, match="Answering is applied twice"):
        made(data=[Answering()(row) for row in ROWS]).setup("fit")


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"prompt": "q ", "completion": "a"}, [("q ", "a")]),
        ({"messages": TURNS}, [("q1", "a1"), ("q2", "a2")]),
        ({"prompt": TURNS[:4], "completion": TURNS[4:]}, [("q2", "a2")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("q", "a")],
        ),
    ],
)
def test_exchanges_are_read_and_written_in_their_format(row, pairs):
    assert exchanges(row) == pairs
    changed = with_exchanges(row, [(f"{q}?", f"{a}!") for q, a in pairs])
    assert exchanges(changed) == [(f"{q}?", f"{a}!") for q, a in pairs]
    assert exchanges(row) == pairs, "the row given was changed"
    if "prompt" in row:
        assert set(changed) == {"prompt", "completion"}
        assert len(changed["prompt"]) == len(row["prompt"]) + isinstance(row["prompt"], str)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"columns \['text'\]: give 'messages'"),
        ({"messages": TURNS[:2]}, "no assistant's turn"),
        ({"messages": [TURNS[0], TURNS[2]]}, "follows a system's"),
        ({"messages": [TURNS[2]]}, "follows a assistant's"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[2]]}, "content is a list"),
    ],
)
def test_rows_without_exchanges(row, message):
    with pytest.raises(ValueError, match=message):
        exchanges(row)


def test_parts_are_learnt_each_in_its_place():
    tokenizer = subword_tokenizer(["hello world, good bye"] * 3, bos=True)
    parts = [("hello", False), (" world", True), (", good", False), (" bye", True)]
    made = tokenize_parts(tokenizer, parts)
    assert made["input_ids"] == [1, *tokenizer("hello world, good bye", add_special_tokens=False)["input_ids"], 4]
    learnt = [token for token in made["labels"] if token != -100]
    assert tokenizer.decode(learnt) == " world bye<|im_end|>"
    assert tokenize_parts(tokenizer, parts, ended=False)["input_ids"] == made["input_ids"][:-1]
    two = tokenize_parts(tokenizer, [("hel", False), ("lo world", True)])
    assert two == tokenize_prompt_completion(tokenizer, "hel", "lo world")
    assert leading_tokens(tokenizer) == [1]
    assert leading_tokens(tiny_tokenizer()) == []


def test_tokenised_rows_go_through_as_they_are():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "messages": "not looked at", "weight": 2}
    made = tokenize_row(row, tiny_tokenizer(), max_length=2)
    assert made == {"input_ids": [5, 6], "labels": [-100, 6], "length": 3, "learnable": 1, "weight": 2.0}
    with pytest.raises(ValueError, match="3 input_ids and 2 labels"):
        tokenize_row({**row, "labels": [1, 2]}, tiny_tokenizer())


# -- the data module ----------------------------------------------------------------------------------------------


def made(data=ROWS, **kwargs):
    return AnsweringData(data, **{"tokenizer": tiny_tokenizer(), "batch_size": 4, **kwargs})


def texts(loader):
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(ids[m.bool()]) for b in loader for ids, m in zip(b["input_ids"], b["attention_mask"])]


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return texts(loader)


def test_only_training_rows_are_rewritten():
    given = made(validation=ROWS, test=ROWS, shuffle=False)
    for stage in ("fit", "test"):
        given.setup(stage)
    plain = [f"{row['prompt']}{row['completion']} <|im_end|>" for row in ROWS]
    assert texts(given.val_dataloader()) == texts(given.test_dataloader()) == plain
    rewritten = [Answering()(row) for row in ROWS]
    expected = [f"{row['prompt']}{row['completion']} <|im_end|>" for row in rewritten]
    assert texts(given.train_dataloader()) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_drawn_anew_in_every_epoch(workers):
    given = made(sampling="per_epoch", num_workers=workers, seed=3)
    given.setup("fit")
    loader = given.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    for epoch in (0, 1, 5):
        rewritten = [Answering(seed=3)(row, epoch) for row in ROWS]
        expected = {f"{row['prompt']}{row['completion']} <|im_end|>" for row in rewritten}
        assert set(epoch_of(loader, epoch)) == expected
    once = made(sampling="per_example", seed=3)
    once.setup("fit")
    assert set(epoch_of(once.train_dataloader(), 5)) == set(epoch_of(loader, 0))


def test_ranks_share_an_epoch_and_rows_that_fill_up_count_for_nothing():
    given = made(data=ROWS[:7], sampling="per_epoch")
    rows = given.rows("train")
    assert isinstance(rows, EpochRows)
    seen, learnt = [], 0
    for rank in range(2):
        sampler = EpochSampler(rows, num_replicas=2, rank=rank)
        sampler.set_epoch(4)
        for index in sampler:
            row = rows[index]
            learnt += sum(label != -100 for label in row["labels"])
            if isinstance(index, RepeatedIndex):
                assert set(row["labels"]) == {-100}
            else:
                seen.append(tiny_tokenizer().decode(row["input_ids"]))
    expected = [Answering()(row, 4) for row in ROWS[:7]]
    assert sorted(seen) == sorted(f"{row['prompt']}{row['completion']} <|im_end|>" for row in expected)
    assert learnt == sum(len(row["completion"].split()) + 1 for row in expected)


def test_tokens_are_cached_by_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(ROWS).to_json(path)
    calls = []
    monkeypatch.setattr(Answering, "rewrite", lambda self, row, epoch: calls.append(1) or row)
    for seed, count in ((0, 12), (0, 0), (1, 12)):
        calls.clear()
        tokenizer = tiny_tokenizer()
        tokenizer(["a", "b c"], padding=True)
        made(data=str(path), seed=seed, tokenizer=tokenizer).setup("fit")
        assert len(calls) == count


def test_packing_and_streams_take_rows_that_stay():
    for option in ("packing", "streaming"):
        with pytest.raises(ValueError, match="set sampling='per_example'"):
            made(sampling="per_epoch", **{option: True})
    packed = made(packing=True, max_length=16)
    packed.setup("fit")
    assert len(packed.rows("train")) < len(ROWS)
    stream = made(streaming=True, shuffle=False)
    stream.setup("fit")
    plain = made(shuffle=False)
    plain.setup("fit")
    assert texts(stream.train_dataloader()) == texts(plain.train_dataloader())
    with pytest.raises(ValueError, match="sampling='often' is not known"):
        made(sampling="often")


class Killed(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _child(folder, kill_at, ckpt_path):
    torch.manual_seed(3)
    network = tiny_gpt2(dropout=0.3)
    module = CausalLM(network, tokenizer=tiny_tokenizer(), optimizer="sgd", learning_rate=0.5)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        max_epochs=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomState(), saving, *([] if kill_at is None else [Killed(kill_at)])],
    )
    trainer.fit(module, made(sampling="per_epoch"), ckpt_path=ckpt_path)
    return [parameter.detach().numpy() for parameter in network.parameters()]


def test_killed_and_resumed_draws_the_same_rows(tmp_path):
    """In the second epoch, of three batches."""
    code, whole = call_in_child(_child, tmp_path / "whole", None, None)
    assert code is None
    code, _ = call_in_child(_child, tmp_path / "killed", 4, None)
    assert code == -signal.SIGKILL
    code, resumed = call_in_child(_child, tmp_path / "killed", None, tmp_path / "killed" / "last.ckpt")
    assert code is None
    assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))
