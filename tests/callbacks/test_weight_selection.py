"""The base of selections: what trains, what optimizers hold, schedules, parts, resumption, refusals, two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft.callbacks import HalfFineTuning, RandomState, SliceFine
from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.parts import Part, leaves_of
from tests.conformance.data import Rows
from tests.conformance.foreign import BuiltInConfigureModel, BuiltInInit, Manual, TwoGroups
from tests.processes import run_on_two
from tests.tiny import tiny_llama

Q, K, V = (f"model.model.layers.0.self_attn.{p}_proj.weight" for p in "qkv")
UP, DOWN = (f"model.model.layers.1.mlp.{p}_proj.weight" for p in ("up", "down"))
NORM = "model.model.norm.weight"


class Chosen(WeightSelection):
    """Trains what it is told, round by round: names of whole weights, or weights with the part that trains.

    Args:
        rounds: For each round the names and parts ({name: [dim, first, length]}); the last one stays.
        **kwargs: Of the base.
    """

    def __init__(self, rounds: list[list[Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rounds = rounds

    def arguments(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "reselect": self.reselect}

    def candidates(self, weights):
        return {w.name for w in weights}

    def _of(self, round: int) -> list[Any]:
        return self.rounds[min(round, len(self.rounds) - 1)]

    def select(self, weights, round):
        return {one for one in self._of(round) if isinstance(one, str)}

    def parts(self, weights, round):
        given = {name: value for one in self._of(round) if isinstance(one, dict) for name, value in one.items()}
        return {name: Part(dim, range(first, first + n)) for name, (dim, first, n) in given.items()}


class Watch(L.Callback):
    """Each step: learning rate, and by name what the optimizers hold and know."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.held: list[set[str]] = []
        self.known: list[dict[str, dict[str, Any]]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, *_):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        (optimizer,) = trainer.optimizers
        self.held.append({names[id(p)] for group in optimizer.param_groups for p in group["params"]})
        self.known.append({names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()})
        self.weights.append({n: v.clone() for n, v in pl_module.state_dict().items()})


def fit(module: L.LightningModule, *callbacks: L.Callback, resume: Any = None, **trainer: Any) -> L.Trainer:
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        options["enable_checkpointing"] = True
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    made = L.Trainer(callbacks=list(callbacks), **{**options, **quiet, **trainer})
    made.fit(module, Rows(batch_size=12, plain=True), ckpt_path=resume)
    return made


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [BuiltInInit, BuiltInConfigureModel, TwoGroups, Manual])
def test_only_the_selection_trains_and_is_held(host):
    module, watch = host(optimizer="adamw"), Watch()
    if host is not BuiltInConfigureModel:
        before = weights(module)
    else:
        before = {f"model.{name}": value for name, value in tiny_llama().state_dict().items()}
    fit(module, Chosen([[Q, NORM, {UP: (1, 3, 2)}]]), watch)
    assert moved(before, weights(module)) == {Q, NORM, UP}
    outside = torch.ones(32, dtype=torch.bool)
    outside[3:5] = False
    assert torch.equal(before[UP][:, outside], module.state_dict()[UP][:, outside])
    held = {Q, NORM, f"{UP}_part1"}
    assert watch.held == [held] * 6
    assert all(known.keys() == held for known in watch.known)
    assert watch.known[-1][f"{UP}_part1"]["exp_avg"].shape == (64, 2)
    assert weights(module).keys() == before.keys()


def test_a_part_equals_the_whole_weight_with_a_masked_update():
    """SGD, and AdamW while the part stays: the same numbers as training all of the weight and keeping the part."""
    part = Part(0, range(4, 7))

    class Masked(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grad = pl_module.get_parameter(Q).grad
            kept = part.take(grad).clone()
            part.put_(grad.zero_(), kept)

    for optimizer in ("sgd", "adamw"):
        made, expected = BuiltInInit(optimizer=optimizer), BuiltInInit(optimizer=optimizer)
        if optimizer == "adamw":
            expected.optimizer_class = lambda: torch.optim.Adam  # AdamW's decay would reach the rest of the weight
            made.optimizer_class = lambda: torch.optim.Adam
        fit(made, Chosen([[{Q: (0, 4, 3)}]]))
        fit(expected, Chosen([[Q]]), Masked())
        for name, value in weights(expected).items():
            torch.testing.assert_close(weights(made)[name], value, rtol=0, atol=1e-6)


def test_moves_leave_schedule_and_kept_moments_alone():
    """Gradients that depend on nothing: what is never deselected has the moments of a run without re-selection."""

    class Constant(BuiltInInit):
        def loss(self, batch):
            generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
            parts = [torch.randn(p.shape, generator=generator) * p for p in self.model.parameters() if p.ndim == 2]
            return sum(part.sum() for part in parts)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    watches = []
    for rounds in ([[Q, K]], [[Q, K], [Q, V]]):
        watches.append(Watch())
        fit(Constant(), Chosen(rounds, reselect="epoch"), watches[-1])
    stays, moves = watches
    assert stays.rates == moves.rates
    assert [rate for (rate,) in moves.rates] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    for still, going in zip(stays.known, moves.known):
        for key, value in still[Q].items():
            assert torch.equal(going[Q][key], value)
    for still, going in zip(stays.weights, moves.weights):
        assert torch.equal(still[Q], going[Q])
    assert moves.held == [{Q, K}] * 3 + [{Q, V}] * 3
    assert moves.known[3].keys() == {Q, V}
    assert moves.known[3][V]["step"] == 1  # the new one begins anew
    assert torch.equal(moves.weights[2][K], moves.weights[5][K])  # the old one has stopped, decay and all


def test_a_leaf_that_moves_stays_the_same_parameter():
    seen = []

    class Leaf(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            leaf = pl_module.get_parameter(f"{Q}_part1")
            seen.append((id(leaf), float(trainer.optimizers[0].state[leaf]["step"])))

    module = BuiltInInit(optimizer="adamw")
    before = weights(module)
    fit(module, Chosen([[{Q: (1, 0, 2)}], [{Q: (1, 9, 2)}]], interval=2), Leaf())
    assert len({one for one, _ in seen}) == 1
    assert [step for _, step in seen] == [1, 2, 1, 2, 3, 4]  # the third round is where the second was: no reset
    changed = (before[Q] != module.state_dict()[Q]).any(0)
    assert changed.nonzero().flatten().tolist() == [0, 1, 9, 10]


def test_optimizers_that_are_born_with_state():
    """Adagrad makes its sums with itself: what is selected later has them too."""

    class Host(BuiltInInit):
        def optimizer_class(self):
            return torch.optim.Adagrad

    module = Host()
    before = weights(module)
    fit(module, Chosen([[Q, {UP: (0, 0, 1)}], [K, {UP: (0, 5, 1)}]], reselect="epoch"))
    assert moved(before, weights(module)) == {Q, K, UP}


def test_two_selections_of_different_weights_in_one_run():
    class Attention(Chosen):
        def candidates(self, weights):
            return {w.name for w in weights if "self_attn" in w.name}

    class Rest(Chosen):
        def candidates(self, weights):
            return {w.name for w in weights if "self_attn" not in w.name}

    module, watch = BuiltInInit(optimizer="adamw"), Watch()
    own = module.configure_optimizers
    fit(module, Attention([[Q], [K]], reselect="epoch"), Rest([[UP], [DOWN]], interval=2), watch)
    assert watch.held == [{Q, UP}, {Q, UP}, {Q, DOWN}, {K, DOWN}, {K, DOWN}, {K, DOWN}]
    assert module.configure_optimizers == own
    assert "_optimizer_groups" not in vars(module)


def test_what_is_not_the_selection_s_to_choose_keeps_its_requires_grad():
    class OnlyQ(Chosen):
        def candidates(self, weights):
            return {Q}

    module = BuiltInInit()
    module.get_parameter(K).requires_grad_(False)
    before = weights(module)
    fit(module, OnlyQ([[Q]]))
    assert K not in moved(before, weights(module))
    assert V in moved(before, weights(module))
    assert not module.get_parameter(K).requires_grad


# -- stages, checkpoints ----------------------------------------------------------------------------------------------


def test_stages_and_the_module_afterwards():
    module = BuiltInInit()
    chosen = Chosen([[Q, {UP: (1, 0, 1)}], [K, {UP: (1, 1, 1)}]])
    for expected in ({Q, UP}, {K, UP}):
        before = weights(module)
        made = fit(module, chosen)
        assert moved(before, weights(module)) == expected
        made.validate(module, Rows(plain=True), verbose=False)
        made.test(module, Rows(plain=True), verbose=False)
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert not any(leaves_of(part) for part in module.modules())
        assert vars(module).keys() == vars(BuiltInInit()).keys()


def test_after_an_exception_the_next_fit_is_clean():
    class Stop(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop here")

    module = BuiltInInit()
    first = Chosen([[{UP: (1, 0, 1)}]])
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, first, Stop())
    before = weights(module)
    fit(module, Chosen([[{UP: (1, 1, 2)}]]))  # another instance
    assert (before[UP] != module.state_dict()[UP]).any(0).nonzero().flatten().tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, first, Stop())
    fit(module, first)  # the same one
    assert not any(leaves_of(part) for part in module.modules())


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    """In mid-interval, at a move and after it: positions, steps of the interval and moments, under dropout."""
    rounds = [[Q, {UP: (1, 0, 2)}], [K, {UP: (1, 7, 2)}], [V, {UP: (1, 4, 2)}]]

    def run(resume: Any = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        L.seed_everything(3, verbose=False)
        module, chosen = BuiltInInit(dropout=0.1, optimizer="adamw"), Chosen(rounds, interval=2)
        data = Rows(batch_size=12)
        made = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[chosen, RandomState(), saving(tmp_path)],
        )
        made.fit(module, data, ckpt_path=resume)
        return weights(module), chosen.state_dict()

    whole, state = run()
    resumed, again = run(str(tmp_path / f"step={stop}.ckpt"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert again["round"] == state["round"] == 2
    assert again["rounds_trained"] == state["rounds_trained"]


def test_a_checkpoint_is_the_modules_own(tmp_path):
    """In mid-run: own keys, current values, plain loading; indices are in the callback's state."""
    module, watch = BuiltInInit(), Watch()
    fit(module, Chosen([[{UP: (1, 0, 2)}], [{UP: (1, 5, 2)}]], interval=2), watch, saving(tmp_path))
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == BuiltInInit().state_dict().keys()
    for name, value in watch.weights[2].items():
        assert torch.equal(checkpoint["state_dict"][name], value)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("Chosen"))
    assert (state["round"], state["steps"], state["selected"]) == (1, 1, [f"{UP}_part1"])
    assert state["parts"][UP]["index"].tolist() == [5, 6]
    plain = BuiltInInit.load_from_checkpoint(tmp_path / "step=3.ckpt")
    assert torch.equal(plain.state_dict()[UP], watch.weights[2][UP])


def test_best_is_tested_with_its_own_weights(tmp_path):
    module = BuiltInInit()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_epochs=1, save_top_k=1)
    made = fit(module, Chosen([[{UP: (1, 0, 8)}]]), best, limit_val_batches=2)
    (tested,) = made.test(module, Rows(plain=True), ckpt_path="best", verbose=False)
    fresh = BuiltInInit.load_from_checkpoint(best.best_model_path)
    (plain,) = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False).test(
        fresh, Rows(plain=True), verbose=False
    )
    assert tested == plain


def test_loading_in_mid_run_reaches_the_leaf():
    module = BuiltInInit()
    start = weights(module)

    class Reload(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.load_state_dict(start)

    other = BuiltInInit()
    fit(module, Chosen([[{UP: (1, 0, 8)}]]), Reload(), max_steps=4)
    fit(other, Chosen([[{UP: (1, 0, 8)}]]), max_steps=1)
    assert torch.equal(module.state_dict()[UP], other.state_dict()[UP])  # both: one step on the first batch


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_two_owners_of_a_weight_are_refused_by_name():
    with pytest.raises(ValueError, match=r"SliceFine and HalfFineTuning would both choose.*keep one"):
        fit(BuiltInInit(), HalfFineTuning(), SliceFine())
    with pytest.raises(ValueError, match="Chosen and Chosen would both choose"):
        fit(BuiltInInit(), Chosen([[Q]]), Chosen([[K]]))


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path):
    fit(BuiltInInit(), HalfFineTuning(seed=1), saving(tmp_path), max_steps=2)
    with pytest.raises(ValueError, match=r"written with HalfFineTuning\{.*'seed': 1.*this run has .*'seed': 2"):
        fit(BuiltInInit(), HalfFineTuning(seed=2), resume=str(tmp_path / "step=2.ckpt"))


def test_a_checkpoint_of_another_choice_is_refused(tmp_path):
    """The same arguments that choose something else: another network."""

    class ByShape(Chosen):
        def select(self, weights, round):
            return {Q if len(weights) == 21 else K}

    fit(BuiltInInit(), ByShape([[]]), saving(tmp_path), max_steps=1)
    module = BuiltInInit()
    module.extra = nn.Linear(2, 2)
    module.strict_loading = False
    with pytest.raises(ValueError, match=r"trains other weights in round 0.*another network or other arguments"):
        fit(module, ByShape([[]]), resume=str(tmp_path / "step=1.ckpt"))


def test_quantised_weights_are_refused():
    pytest.importorskip("bitsandbytes")
    from lightning_peft.quantization import quantize

    for given in ({"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}):
        for callback in (HalfFineTuning(), SliceFine()):
            module = BuiltInInit()
            quantize(module.model, given)
            with pytest.raises(
                ValueError, match=rf"{type(callback).__name__}: .*proj\.weight is stored in .*quantised"
            ):
                fit(module, callback)


def test_shared_weights_and_heads_do_not_train_in_part():
    head, embedding = "model.lm_head.weight", "model.model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"lm_head\.weight is shared by several modules or makes the logits"):
        fit(BuiltInInit(), Chosen([[{head: (0, 0, 1)}]]))
    module = BuiltInInit()
    module.model = tiny_llama(tie=True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is shared"):
        fit(module, Chosen([[{embedding: (0, 0, 1)}]]))


def test_strategies_that_hide_parameters_are_refused():
    from lightning.pytorch.strategies import DDPStrategy

    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="spawn"), logger=False)
    trainer.strategy._configure_launcher()
    with pytest.raises(ValueError, match=r"Chosen does not work with DDPStrategy.*spawned.*strategy='ddp'"):
        Chosen([[Q]]).setup(trainer, BuiltInInit(), "fit")


def test_bad_arguments_and_empty_selections():
    with pytest.raises(ValueError, match=r"reselect='step'.*stage.*epoch.*never"):
        Chosen([[Q]], reselect="step")
    with pytest.raises(ValueError, match="interval=0"):
        Chosen([[Q]], interval=0)
    with pytest.raises(ValueError, match="Chosen selects no weight in round 0"):
        fit(BuiltInInit(), Chosen([[]]))


def test_a_network_without_blocks_is_refused_where_blocks_are_needed():
    class Plain(BuiltInInit):
        def build(self):
            self.model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(ValueError, match=r"Sequential has no transformer blocks.*Linear"):
        fit(Plain(), HalfFineTuning())


def test_a_part_whose_module_is_not_called_is_told():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    class Host(BuiltInInit):
        def build(self):
            super().build()
            self.model.reads = Reads()

        def loss(self, batch):
            made = self.model.reads(self.model.model.embed_tokens(batch["input_ids"])).square().mean()
            return super().loss(batch) + made

    with pytest.warns(UserWarning, match=r"Chosen: 1 of 1 parts got no gradient.*reads\.inner\.weight_part0"):
        fit(Host(), Chosen([[Q, {"model.reads.inner.weight": (0, 0, 1)}]]), max_steps=1)


# -- two processes ----------------------------------------------------------------------------------------------------


class SaveAfterMoves(L.Callback):
    """Checkpoints right after each move, before the step that follows."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(f"{self.folder}/moved.ckpt")


def choose_on_two(rank: int, folder: str) -> dict[str, Any]:
    """DDP and FSDP2 (network built in configure_model), whole and resumed just after a move; what each rank chose."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    def strategy(name: str, distributed: bool = True) -> Any:
        if name == "ddp":
            return DDPStrategy(process_group_backend="gloo")
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed, process_group_backend="gloo")

    def run(name: str, callback: WeightSelection, resume: str | None = None, distributed: bool = True) -> Any:
        L.seed_everything(0, verbose=False)
        module = BuiltInConfigureModel(optimizer="adamw")
        seen = []

        class See(L.Callback):
            def on_train_batch_end(self, *_):
                state = callback.state_dict()
                seen.append((state["selected"], {n: p["index"].tolist() for n, p in state["parts"].items()}))

        path = f"{folder}/{name}-{type(callback).__name__}-{distributed}"
        made = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy(name, distributed),
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1,
            callbacks=[callback, See(), *([] if resume else [SaveAfterMoves(path)])],
        )
        # A plain loader: at an epoch's first batch it has nothing to remember.
        made.fit(module, Rows(batch_size=6, plain=True), ckpt_path=f"{path}/moved.ckpt" if resume else None)
        whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in module.state_dict().items()}
        return seen, {n: v.detach().clone() for n, v in whole.items()}

    answers = {}
    for name, distributed in (("ddp", True), ("fsdp2", True), ("fsdp2", False)):
        for kind in (HalfFineTuning, SliceFine):
            arguments: dict[str, Any] = {"reselect": "epoch"}
            if kind is SliceFine:
                arguments = {"rank": 3, "orientation": "alternate", "interval": 3, "order": "random"}
            whole = run(name, kind(**arguments), distributed=distributed)
            resumed = run(name, kind(**arguments), "moved", distributed)
            answers[f"{name} {kind.__name__} {distributed}"] = (whole, resumed)
    return answers


def test_ranks_choose_alike_and_resume_just_after_a_move(tmp_path):
    first, second = run_on_two(choose_on_two, str(tmp_path))
    for name, ((seen, whole), (again, resumed)) in first.items():
        (other_seen, other), _ = second[name]
        assert seen == other_seen, f"{name}: the ranks chose differently"
        assert again == seen[3:], name
        assert seen[2] != seen[3], f"{name}: it did not move"
        for weight, value in whole.items():
            assert torch.equal(value, other[weight]), f"{name}: {weight} differs between ranks"
            assert torch.equal(value, resumed[weight]), f"{name}: {weight} differs after the resume"
        one = "ddp " + name.split(" ", 1)[1].replace("False", "True")
        for weight, value in first[one][0][1].items():
            torch.testing.assert_close(whole[weight], value, rtol=0, atol=1e-4)
