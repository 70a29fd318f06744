"""Data on two real processes under DDP: one pair runs all cases."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import RandomSampler

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.datamodules.self_distillation import SelfDistillationData
from tests.datamodules.test_look_ahead_trainer import Module, check, collate
from tests.processes import run_on_two
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"{word} ", "completion": "yes " * n} for n, word in enumerate("abcdefghi", 1)]


def fit(folder, loader, callbacks=(), ckpt_path=None, module=None, **kwargs):
    module = module or Module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **{"accumulate_grad_batches": 2, **kwargs},
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module


def steps(module):
    check(module)
    return [[ids for ids, *_ in step] for step in module.diary]


class Counts(L.LightningModule):
    """Counts the labels of validation, and what a causal language model would train on."""

    def __init__(self):
        super().__init__()
        self.model, self.tokenizer = tiny_llama(), tiny_tokenizer()
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(int((batch["labels"] != -100).sum()))
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sum() * 0

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(int((batch["labels"] != -100).sum()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def cases(rank, folder):
    made = {}
    # Built before there is a process group, as in a script.
    loader = LookAheadDataLoader(range(23), batch_size=2, shuffle=True, collate_fn=collate)
    made["whole"] = steps(fit(folder, loader, max_epochs=2))
    # Another sampler: Lightning makes the loader anew around a distributed one.
    loader = LookAheadDataLoader(range(23), batch_size=2, sampler=RandomSampler(range(23)), collate_fn=collate)
    made["wrapped"] = steps(fit(folder, loader, max_epochs=1))

    saving = ModelCheckpoint(folder, filename="stopped", every_n_train_steps=5, save_top_k=-1)
    loader = LookAheadDataLoader(range(23), batch_size=2, shuffle=True, collate_fn=collate)
    fit(folder, loader, [saving], max_steps=5, max_epochs=9)
    loader = LookAheadDataLoader(range(23), batch_size=2, shuffle=True, collate_fn=collate)
    made["resumed"] = steps(fit(folder, loader, ckpt_path=folder / "stopped.ckpt", max_epochs=2))

    data = InstructionData(ROWS, validation=ROWS, batch_size=2)
    module = fit(folder, data, module=Counts(), max_epochs=1, num_sanity_val_steps=0)
    made["counts"] = module.seen

    data = SelfDistillationData(
        ROWS, generation={"max_new_tokens": 3}, unfinished="keep", cache_dir=str(folder), shard_size=2, batch_size=2
    )
    fit(folder, data, module=Counts(), max_steps=1)
    made["answers"] = [row["input_ids"].tolist() for row in data.rows("train")]
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return *run_on_two(cases, folder), folder


@pytest.mark.parametrize("case", ["whole", "wrapped"])
def test_ranks_share_an_epoch_and_count_their_own_steps(results, case):
    first, second, _ = results
    for begin in range(0, len(first[case]), 3):  # 12 rows a rank in 6 batches: three steps an epoch
        of_epoch = first[case][begin : begin + 3] + second[case][begin : begin + 3]
        epoch = [row for step in of_epoch for ids in step for row in ids]
        assert len(epoch) == 24
        assert set(epoch) == set(range(23))
    assert [len(step) for step in first[case]] == [len(step) for step in second[case]]


def test_resumed_in_mid_epoch(results):
    for rank in results[:2]:
        assert rank["resumed"] == rank["whole"][5:]


def test_nine_rows_over_two_ranks_count_once(results):
    first, second, _ = results
    labels = sum(n + 1 for n in range(1, 10))
    for split in ("train", "val"):
        assert len(first["counts"][split]) == len(second["counts"][split]) == 3
        assert sum(first["counts"][split]) + sum(second["counts"][split]) == labels


def test_answers_are_generated_once_and_the_same_on_both_ranks(results):
    first, second, folder = results
    assert first["answers"] == second["answers"]
    assert len(first["answers"]) == 9
    assert len(list(folder.glob("self_distillation/*/shard-*.parquet"))) == 5
