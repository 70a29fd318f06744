"""Model Stock during training, against a plain loop, through kills, on two processes."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn

from lightning_peft.callbacks.model_stock import ModelStock
from lightning_peft.callbacks.random_state import RandomState
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.datamodules.resumable_sampler import ResumableSampler
from lightning_peft.merging import model_stock
from tests.processes import call_in_child, run_on_two

ROWS, BATCH = 24, 4  # six steps an epoch


class Data(torch.utils.data.Dataset):
    """Rows of a fixed linear map with noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, 6, generator=generator)
        self.y = self.x @ torch.randn(6, 3, generator=generator) + 0.1 * torch.randn(ROWS, 3, generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


class Net(L.LightningModule):
    """Plain Lightning, two layers; the first may be frozen for a while."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0, freeze: bool = False, meta: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.net[0].requires_grad_(not freeze)
        self.seen: list[dict[str, torch.Tensor]] = []  # the weights at each validation

    def configure_model(self):
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch["x"]) - batch["y"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch["x"]) - batch["y"]).square().mean(), sync_dist=True)

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.seen.append(weights(self))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.hparams["optimizer"]]
        momentum = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        optimizer = cls(self.net.parameters(), lr=0.05, weight_decay=0.01, **momentum)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.05 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return {name: whole(value.detach()).clone() for name, value in module.state_dict().items()}


def loader(shuffle: bool = True, batch: int = BATCH) -> LookAheadDataLoader:
    return LookAheadDataLoader(Data(), batch_size=batch, shuffle=shuffle)


def trainer(*callbacks: L.Callback, epochs: int = 4, **kwargs) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet, **kwargs}
    return L.Trainer(callbacks=list(callbacks), max_epochs=epochs, **options)


def fitted(stock: ModelStock | None = None, module: Net | None = None, batch: int = BATCH, **kwargs) -> Net:
    module = module or Net()
    trainer(*([stock] if stock else []), **kwargs).fit(module, loader(batch=batch))
    return module


def by_hand(epochs: int, period: str | int, models: int, keep: bool, optimizer: str, accumulate: int = 1, **options):
    """The same in a plain loop over deep copies, each with its own optimizer; the merges in order."""
    base = Net(optimizer)
    theta0 = weights(base)
    sampler = ResumableSampler(Data(), shuffle=True, seed=0)
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches += [[Data()[i] for i in order[start : start + BATCH]] for start in range(0, ROWS, BATCH)]
    steps = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    length = ROWS // BATCH // accumulate if period == "epoch" else int(period)
    optimizers: dict[int, dict] = {}
    start, trained, merges = theta0, [], []
    for turn in range(len(steps) // length):
        model = turn % models
        copied = copy.deepcopy(base)
        copied.load_state_dict(start)
        configured = copied.configure_optimizers()["optimizer"]
        if keep and model in optimizers:
            configured.load_state_dict(optimizers[model])
        for number in range(turn * length, (turn + 1) * length):
            for group in configured.param_groups:
                group["lr"] = 0.05 / (1 + 0.05 * number)  # the schedule runs over all turns
            configured.zero_grad()
            for rows in steps[number]:
                batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "y")}
                (copied.training_step(batch, 0) / accumulate).backward()
            configured.step()
        optimizers[model] = configured.state_dict()
        trained.append(weights(copied))
        if len(trained) == models:
            start, trained = model_stock(theta0, trained, **options), []
            merges.append(start)
    return merges


def assert_close(one, two, tolerance: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=tolerance, rtol=0, msg=lambda told, n=name: f"{n}: {told}"
        )


def assert_equal(one, two) -> None:
    assert_close(one, two, 0.0)


# -- against a plain loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("period", "partners", "epochs", "accumulate"), [("epoch", 1, 4, 1), ("epoch", 2, 6, 2), (2, 1, 2, 1), (1, 2, 2, 3)]
)
def test_equals_models_trained_and_merged_by_hand(optimizer, keep, period, partners, epochs, accumulate):
    stock = ModelStock(period, partners, "keep" if keep else "reset")
    module = fitted(stock, Net(optimizer), epochs=epochs, accumulate_grad_batches=accumulate)
    merges = by_hand(epochs, period, partners + 1, keep, optimizer, accumulate)
    assert len(merges) >= 1
    assert stock.round == len(merges)
    assert_close(weights(module), merges[-1])
    other = by_hand(epochs, period, partners + 1, not keep, optimizer, accumulate)
    if len(merges) > 1:  # the two options are different things
        assert max((merges[-1][n] - other[-1][n]).abs().max() for n in other[-1]) > 1e-4


@pytest.mark.parametrize("options", [{"filter_wise": True}, {"pairwise": "angle"}, {"clamp": True}])
def test_options_are_those_of_the_function(options):
    module = fitted(ModelStock(2, 2, **options), epochs=2)
    assert_close(weights(module), by_hand(2, 2, 3, True, "sgd", **options)[-1])


def test_validation_and_checkpoints_at_an_epoch_s_end_hold_the_merge(tmp_path):
    module = Net("adamw")
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val_loss")
    theta0 = weights(module)
    run = trainer(ModelStock(), saving, epochs=4, enable_checkpointing=True)
    run.fit(module, loader(), loader(shuffle=False))
    merges = by_hand(4, "epoch", 2, True, "adamw")
    for seen, expected in zip(module.seen, [theta0, merges[0], merges[0], merges[1]], strict=True):
        assert_close(seen, expected)
    for epoch, seen in enumerate(module.seen):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert_equal(weights(Net.load_from_checkpoint(path)), seen)  # weights_only, by plain Lightning
    run.test(ckpt_path="best", dataloaders=loader(shuffle=False), verbose=False)


def test_says_what_it_did(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    fitted(ModelStock(3), epochs=2, logger=logger, log_every_n_steps=1)
    logged = [row for row in logger.experiment.metrics if "model_stock_ratio" in row]
    if not logged:  # already written
        import csv

        with open(Path(logger.log_dir) / "metrics.csv") as file:
            logged = [row for row in csv.DictReader(file) if row["model_stock_ratio"]]
    assert [float(row["model_stock_round"]) for row in logged] == [1, 2]
    # Below 1 by its formula; models of one step each may point away from each other, which makes it negative.
    assert all(-1 < float(row["model_stock_ratio"]) < 1 for row in logged)
    assert len({row["model_stock_ratio"] for row in logged}) == 2


# -- what trains ----------------------------------------------------------------------------------------------------


def test_frozen_weights_stay_and_are_not_kept():
    module = Net(freeze=True)
    before = weights(module)
    stock = ModelStock(2)
    fitted(stock, module, epochs=2)
    after = weights(module)
    assert all(torch.equal(before[name], after[name]) == name.startswith("net.0") for name in before)
    assert {name.split(".")[1] for name in stock.state_dict()["theta0"]} == {"3"}


class Thaw(L.Callback):
    """Unfreezes the first layer at a step, and freezes the last one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            pl_module.net[0].requires_grad_(True)


@pytest.mark.parametrize("step", [4, 6, 5])  # in the second round: its first turn, its second turn, within a turn
def test_weights_that_are_unfrozen_later(step):
    module = Net(freeze=True)
    theta0 = weights(module)
    stock = ModelStock(2)
    trainer(stock, Thaw(step), epochs=2).fit(module, loader())
    state = stock.state_dict()
    assert_equal(state["theta0"], theta0)
    assert not torch.equal(weights(module)["net.0.weight"], theta0["net.0.weight"])


def test_a_frozen_weight_of_an_earlier_round_does_not_drift():
    class Freeze(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6:  # where a round ends
                pl_module.net[0].requires_grad_(False)
                pl_module.net[0].zero_grad()
                self.held = weights(pl_module)

    freeze, module = Freeze(), Net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), lr=0.05)  # type: ignore[method-assign]
    trainer(ModelStock(1, 2), freeze, epochs=2).fit(module, loader())
    after = weights(module)
    assert torch.equal(after["net.0.weight"], freeze.held["net.0.weight"])
    assert not torch.equal(after["net.3.weight"], freeze.held["net.3.weight"])


# -- the end of a run -----------------------------------------------------------------------------------------------


def test_a_run_that_ends_within_a_round():
    module = Net()
    with pytest.warns(UserWarning, match="the last 2 steps of this run are no whole round of 4"):
        trainer(ModelStock(2), epochs=-1, max_steps=6).fit(module, loader())  # one model of round 2 has trained
    assert_close(weights(module), by_hand(1, 2, 2, True, "sgd")[0])
    module = Net()
    trainer(ModelStock(2), epochs=-1, max_steps=7).fit(module, loader())  # both have, one for a step
    assert not torch.allclose(weights(module)["net.0.weight"], by_hand(1, 2, 2, True, "sgd")[0]["net.0.weight"])
    stock = ModelStock(2, 2)
    module = Net()
    trainer(stock, epochs=-1, max_steps=10).fit(module, loader())  # two of three in round 2
    assert (stock.round, stock.turn) == (2, 0)


def test_early_stop_before_two_models_have_trained_says_so():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    module = Net()
    before = weights(module)
    with pytest.warns(UserWarning, match="the network is the last merge \\(the pretrained weights\\)"):
        trainer(ModelStock(5), Stop(), epochs=4).fit(module, loader())
    assert_equal(weights(module), before)


def test_fit_again_goes_on_from_the_merge_with_the_same_base():
    module, stock = Net(), ModelStock(3)
    theta0 = weights(module)
    fitted(stock, module, epochs=1)
    first = weights(module)
    trainer(stock).test(module, loader(shuffle=False), verbose=False)
    assert_equal(weights(module), first)
    fitted(stock, module, epochs=1)
    assert_equal(stock.state_dict()["theta0"], theta0)
    assert stock.round == 2
    assert not torch.equal(weights(module)["net.0.weight"], first["net.0.weight"])
    other = Net()
    with torch.no_grad():
        other.net[0].weight.add_(1)
    expected = weights(other)
    fitted(stock, other, epochs=1)  # another network has a base of its own
    assert_equal(stock.state_dict()["theta0"], expected)


# -- resume ---------------------------------------------------------------------------------------------------------


class Kill(L.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _saved_run(folder: str, kill_at: int | None, resume: str | None, stock: dict, optimizer: str, **kwargs):
    """A run with dropout that saves after each step; its weights and optimizer state."""
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    module = Net(optimizer, dropout=0.2)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        ModelStock(**stock), RandomState(), Kill(kill_at), saving, epochs=2, enable_checkpointing=True, **kwargs
    )
    run.fit(module, loader(batch=BATCH // run.world_size), ckpt_path=resume)
    return weights(module)


@pytest.mark.parametrize(
    ("stock", "steps"),
    [
        ({"period": "epoch"}, (3, 6, 7, 11)),
        ({"period": 2, "partners": 2}, (1, 2, 3, 4, 5, 6, 7)),
        ({"period": 3, "optimizer_state": "reset", "filter_wise": True}, (5, 6)),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_killed_and_resumed_is_bit_equal(tmp_path, stock, steps, optimizer):
    whole = _saved_run(str(tmp_path / "whole"), None, None, stock, optimizer)
    for step in steps:
        folder = tmp_path / str(step)
        code, _ = call_in_child(_saved_run, str(folder), step, None, stock, optimizer)
        assert code == -signal.SIGKILL
        resumed = _saved_run(str(folder), None, str(folder / f"step={step}.ckpt"), stock, optimizer)
        assert_equal(resumed, whole)


# -- two processes --------------------------------------------------------------------------------------------------


def _on_rank(rank: int, strategy: str, stock: dict, optimizer: str, epochs: int):
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    made = (
        DDPStrategy(process_group_backend="gloo")
        if strategy == "ddp"
        else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    )
    module = fitted(ModelStock(**stock), Net(optimizer), batch=BATCH // 2, epochs=epochs, devices=2, strategy=made)
    return weights(module)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stock", [{}, {"period": 2, "partners": 2}, {"period": 1, "filter_wise": True}])
def test_two_processes_equal_one(strategy, stock):
    one = weights(fitted(ModelStock(**stock), Net("sgd"), epochs=2))
    ranks = run_on_two(_on_rank, strategy, stock, "sgd", 2)
    assert_equal(ranks[0], ranks[1])
    assert_close(ranks[0], one)


def _fsdp2_resume(rank: int, folder: str, step: int | None, stock: dict, distributed: bool):
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=distributed,
    )
    resume = None if step is None else str(Path(folder) / f"step={step}.ckpt")
    target = folder if step is None else str(Path(folder) / f"resumed{step}")
    return _saved_run(target, None, resume, stock, "adamw", devices=2, strategy=strategy)


@pytest.mark.parametrize(("distributed", "steps"), [(True, (1, 2, 3, 5)), (False, (3,))])
def test_resume_under_fsdp2(tmp_path, distributed, steps):
    stock = {"period": 2, "partners": 1}
    whole = run_on_two(_fsdp2_resume, str(tmp_path), None, stock, distributed)
    for step in steps:
        resumed = run_on_two(_fsdp2_resume, str(tmp_path), step, stock, distributed)
        assert_equal(resumed[0], whole[0])
        assert_equal(resumed[1], whole[1])


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"period": 0}, "period=0 must be 'epoch' or a number"),
        ({"period": "step"}, "period='step' must be"),
        ({"period": True}, "period=True must be"),
        ({"partners": 0}, "partners=0 must be at least 1"),
        ({"optimizer_state": "carry"}, "optimizer_state='carry'.*keep"),
        ({"pairwise": "median"}, "pairwise='median'"),
    ],
)
def test_refuses_arguments(arguments, told):
    with pytest.raises(ValueError, match=told):
        ModelStock(**arguments)


def test_refuses_runs_without_a_round():
    with pytest.raises(ValueError, match="merges after 3 more epochs and the run has 2 left"):
        fitted(ModelStock(partners=2), epochs=2)
    with pytest.raises(ValueError, match="merges after 8 more steps and the run has 7 left"):
        fitted(ModelStock(4), epochs=-1, max_steps=7)
    with pytest.warns(UserWarning, match="the last 1 epochs of this run are no whole round of 2"):
        fitted(ModelStock(), epochs=3)


def test_refuses_what_would_average_models_that_take_turns():
    with pytest.raises(ValueError, match="ModelStock and WeightAveraging in one run"):
        trainer(ModelStock(), WeightAveraging()).fit(Net(), loader())
    with pytest.raises((ValueError, RuntimeError), match="ModelStock"):
        trainer(ModelStock(), ModelStock(2)).fit(Net(), loader())


def test_refuses_checkpoints_that_are_not_its_own(tmp_path):
    plain = tmp_path / "plain.ckpt"
    run = trainer(epochs=1)
    run.fit(Net(), loader())
    run.save_checkpoint(plain)
    with pytest.raises(ValueError, match=r"no state of ModelStock.*without ckpt_path"):
        trainer(ModelStock(), epochs=3).fit(Net(), loader(), ckpt_path=plain)
    own = tmp_path / "own.ckpt"
    run = trainer(ModelStock(), epochs=2)
    run.fit(Net(), loader())
    run.save_checkpoint(own)
    with pytest.raises(ValueError, match="partners=1, this run has partners=2"):
        trainer(ModelStock(partners=2), epochs=6).fit(Net(), loader(), ckpt_path=own)


def test_nothing_trains():
    module = Net()
    module.requires_grad_(False)
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no parameter trains"):
        trainer(ModelStock()).fit(module, loader())
