"""The loader under real Trainers: its windows are Lightning's optimizer steps, and killed runs go on exactly."""

import os
import signal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import IterableDataset, RandomSampler

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from tests.processes import call_in_child


def collate(rows):
    return {"ids": torch.tensor(rows), "sizes": torch.tensor([row % 5 + 1 for row in rows])}


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


class Module(L.LightningModule):
    """Binds its loader as a FineTuningModule does, and keeps a diary by optimizer step."""

    def __init__(self, kill_before=None, early=False):
        super().__init__()
        self.early = early
        self.layer = torch.nn.Linear(1, 1)
        self.kill_before = kill_before
        self.diary, self.step = [], []

    def window(self, batch_idx):
        return int(min(self.trainer.accumulate_grad_batches, max(self.trainer.num_training_batches - batch_idx, 1)))

    def on_train_start(self):
        # Where `configure_optimizers` has asked for the number of steps, the loader was made before the checkpoint's
        # loops were restored, and Lightning leaves its state behind.
        self.trainer.fit_loop._load_combined_loader_states()
        for loader in self.trainer.fit_loop._combined_loader.flattened:
            loader.bind(lambda batch: batch, lambda batch: {"n": int(batch["sizes"].sum())}, self.window)

    def training_step(self, batch, batch_idx):
        if self.kill_before is not None and len(self.diary) == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.step.append((batch["ids"].tolist(), int(batch["sizes"].sum()), batch["step_counts"], batch["step_start"]))
        return (self.layer(batch["ids"].float()[:, None] / 10).squeeze(1) ** 2 * batch["sizes"]).sum() / 100

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.diary.append(self.step)
        self.step = []

    def configure_optimizers(self):
        if self.early:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(tmp_path, callbacks=(), **kwargs):
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **kwargs,
    )


def check(module):
    """Every batch carries the sum over the batches of the optimizer step it really was in."""
    for step in module.diary:
        total = sum(size for _, size, _, _ in step)
        assert [counts["n"] for _, _, counts, _ in step] == [total] * len(step)
        assert [start for *_, start in step] == [True] + [False] * (len(step) - 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [3, 3, 1] * 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 3, "limit_train_batches": 5}, [3, 2] * 2),
        ({"max_steps": 4, "max_epochs": 9, "accumulate_grad_batches": 3}, [3, 3, 1, 3]),
        (
            {"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})]},
            [2, 2, 2, 1, 3, 3, 1] + [1] * 7,
        ),
    ],
)
def test_windows_are_lightnings_steps(settings, steps, streaming, tmp_path):
    module = Module()
    if streaming:
        loader = LookAheadDataLoader(Stream(20), batch_size=3, collate_fn=collate)
    else:
        loader = LookAheadDataLoader(range(20), batch_size=3, shuffle=True, collate_fn=collate)
    trainer(tmp_path, **settings).fit(module, loader)
    assert [len(step) for step in module.diary] == steps
    check(module)


def _fit(folder, kill_before, ckpt_path, streaming, workers, early):
    torch.manual_seed(0)
    module = Module(kill_before, early)
    dataset = Stream(23) if streaming else range(23)
    loader = LookAheadDataLoader(
        dataset, 2, shuffle=None if streaming else True, collate_fn=collate, num_workers=workers
    )
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    trainer(folder, [saving], max_epochs=3, accumulate_grad_batches=2).fit(module, loader, ckpt_path=ckpt_path)
    check(module)
    return [[ids for ids, *_ in step] for step in module.diary], module.layer.weight.item(), module.layer.bias.item()


@pytest.mark.parametrize(
    ("kill_before", "streaming", "workers", "early"),
    [
        (2, False, 0, False),
        (6, False, 0, False),
        (8, False, 0, True),
        (11, False, 2, False),
        (12, False, 0, True),
        (4, True, 0, False),
        (9, True, 0, False),
        (9, True, 0, True),
    ],
)
def test_killed_and_resumed_is_bit_equal(kill_before, streaming, workers, early, tmp_path):
    """23 rows in 12 batches, 6 steps an epoch: kills in mid-epoch, at a border, and one step after it."""
    code, (steps, *weights) = call_in_child(_fit, tmp_path / "whole", None, None, streaming, workers, early)
    assert code is None
    code, none = call_in_child(_fit, tmp_path / "killed", kill_before, None, streaming, workers, early)
    assert (code, none) == (-signal.SIGKILL, None)
    code, (rest, *resumed) = call_in_child(
        _fit, tmp_path / "killed", None, tmp_path / "killed" / "last.ckpt", streaming, workers, early
    )
    assert code is None
    assert rest == steps[kill_before:]
    assert resumed == weights


@pytest.mark.parametrize("inside_hook", [False, True])
def test_lightning_can_make_the_loader_anew_to_inject_its_sampler(inside_hook, tmp_path):
    """As it does under DDP for a sampler that is not distributed, and for prediction."""
    from lightning.fabric.utilities.data import _replace_dunder_methods
    from lightning.pytorch.utilities.data import _update_dataloader
    from torch.utils.data import DataLoader, DistributedSampler

    def make():
        return LookAheadDataLoader(
            range(12), 3, sampler=RandomSampler(range(12)), collate_fn=collate, drop_last=True, seed=4
        )

    if inside_hook:
        with _replace_dunder_methods(DataLoader, "dataset"):
            loader = make()
    else:
        loader = make()
    anew = _update_dataloader(loader, DistributedSampler(range(12), num_replicas=2, rank=1, shuffle=False))
    assert type(anew) is LookAheadDataLoader
    assert (anew.batch_size, anew.drop_last, anew.collate_fn, anew.seed) == (3, True, collate, 4)
    anew.bind(lambda batch: batch, lambda batch: {"n": len(batch["ids"])}, lambda batch_idx: 2)
    assert [(batch["ids"].tolist(), batch["step_counts"]["n"]) for batch in anew] == [([1, 3, 5], 6), ([7, 9, 11], 6)]
