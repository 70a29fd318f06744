"""DSEE's stages: train, prune, train on; what each leaves alone, and that a run may be killed in any of them."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn

from lightning_peft.adapters.dsee import dsee_layers, unpacked
from lightning_peft.adapters.dsee_pruning import is_pruned, prune_entries, remove_heads, sparsities
from lightning_peft.adapters.injection import tuner_of
from lightning_peft.callbacks import DSEE, DeltaCheckpoint, RandomState
from lightning_peft.callbacks import dsee as dsee_module
from lightning_peft.callbacks.dsee import IGNORED
from lightning_peft.delta import load_delta
from lightning_peft.export import export
from lightning_peft.models import CausalLM
from tests.adapted import QUIET, Classifier, Foreign, fit, loader, logits
from tests.conformance.data import Rows
from tests.conformance.foreign import BuiltInConfigureModel, BuiltInInit
from tests.processes import call_in_child, run_on_two
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

SMALL: dict[str, Any] = {
    "r": 4,
    "alpha": 8,
    "num_sparse": 10,
    "positions": "magnitude",
    "prune_after": 2,
    "prune_unit": "step",
    "sparsity": 0.3,
    "sparsity_others": 0.1,
    "heads": 1,
}
KINDS = ["unstructured", "structured"]


def masks(module: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Copies of every mask of the adapter, by layer."""
    return {
        f"{name}.{kind}": getattr(layer, f"dsee_{kind}")[adapter_name].clone()
        for name, layer in dsee_layers(module, adapter_name).items()
        for kind in ("mask", "columns")
        if adapter_name in getattr(layer, f"dsee_{kind}")
    }


class See(L.Callback):
    """After each step: is the base pruned, masks, learning rate, loss, and how many steps the optimizer knows of."""

    def __init__(self) -> None:
        self.pruned: list[bool] = []
        self.masks: list[dict[str, torch.Tensor]] = []
        self.counts: list[set[int]] = []
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pruned.append(is_pruned(pl_module, "default"))
        self.masks.append(masks(pl_module))
        states = [s for o in trainer.optimizers for s in o.state.values() if "step" in s]
        self.counts.append({int(s["step"]) for s in states})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.losses.append(float(outputs["loss"]))


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", KINDS)
def test_the_base_is_pruned_after_so_many_steps_and_the_optimizer_starts_anew(prune):
    module, see = Foreign(), See()
    fit(module, [DSEE(**SMALL, prune=prune), see], steps=5)
    assert see.pruned == [False, False, True, True, True]
    assert see.counts == [{1}, {2}, {1}, {2}, {3}]
    for later in see.masks[3:]:
        assert all(torch.equal(mask, later[name]) for name, mask in see.masks[2].items()), "S1 moved in stage 3"
    assert "configure_optimizers" not in vars(module)
    assert not {"_optimizer_groups", IGNORED} & vars(module).keys()


def test_stages_by_epochs():
    see = See()
    fit(Foreign(), [DSEE(**{**SMALL, "prune_after": 1, "prune_unit": "epoch"}), see], steps=8)
    assert see.pruned == [False] * 4 + [True] * 4
    assert see.counts == [{1}, {2}, {3}, {4}, {1}, {2}, {3}, {4}]


def test_the_border_is_at_a_window_of_micro_batches():
    see = See()
    fit(Foreign(), [DSEE(**{**SMALL, "prune_after": 1}), see], steps=3, accumulate_grad_batches=2)
    assert see.pruned == [False, False, True, True, True, True]


def test_the_learning_rate_goes_on():
    def rates(**kwargs) -> list[float]:
        module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer(), learning_rate=0.01, warmup_steps=2)
        rows = [{"input_ids": r, "labels": r} for b in loader() for r in b["ids"]]
        see = See()
        trainer = L.Trainer(
            **QUIET, max_steps=4, enable_checkpointing=False, callbacks=[DSEE(**{**SMALL, **kwargs}), see]
        )
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
        return see.rates

    assert rates() == rates(prune="none")


def test_sparsity_after_stage_2_is_exact_and_masked_weights_stay_0_through_stage_3():
    """Under AdamW with weight decay, which must not bring anything back; W itself does not move."""

    class Decays(Foreign):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.3)

    module, plain = Decays(), tiny_llama()
    fit(module, [DSEE(**SMALL)], steps=6)
    # q and v: [32, 32] and [16, 32]; k, o and three of [64, 32] besides, in two blocks.
    adapted, others = 2 * (32 * 32 + 16 * 32), 2 * (16 * 32 + 32 * 32 + 3 * 64 * 32)
    shares = sparsities(module.net, "default")
    assert shares == {"adapted": round(0.3 * adapted) / adapted, "others": round(0.1 * others) / others}
    zeros = {True: 0, False: 0}
    for name, layer in dsee_layers(module.net, "default").items():
        is_adapted = "default" in layer.dsee_U
        assert torch.equal(layer.base_layer.weight, plain.get_parameter(f"{name}.weight"))
        answer = layer(torch.eye(layer.in_features)).T  # the matrix that acts
        acts = answer - layer.get_delta_weight("default") if is_adapted else answer
        gone = ~unpacked(layer.dsee_mask.default, acts.shape)
        torch.testing.assert_close(acts[gone], torch.zeros(int(gone.sum())), rtol=0, atol=1e-6)
        torch.testing.assert_close(acts[~gone], layer.base_layer.weight[~gone], rtol=0, atol=1e-6)
        if not is_adapted:
            assert not acts[gone].any(), "exactly 0"
        zeros[is_adapted] += int(gone.sum())
    assert zeros == {True: round(0.3 * adapted), False: round(0.1 * others)}


@pytest.mark.parametrize("score", ["WABS", "ABS"])
def test_the_three_stages_are_those_by_hand(score):
    """Two steps of SGD, masks of what they led to, two more steps under the masks."""
    module, callback = Foreign(optimizer="SGD", lr=0.5), DSEE(**SMALL, score=score)
    callback.attach(module)
    by_hand = copy.deepcopy(module)
    fit(module, [callback], steps=4)
    trains = [p for p in by_hand.parameters() if p.requires_grad]
    for step, batch in enumerate(loader()):
        if step == 2:
            prune_entries(by_hand.net, "default", 0.3, 0.1, score)
        gradients = torch.autograd.grad(by_hand.loss(batch), trains)
        with torch.no_grad():
            for parameter, gradient in zip(trains, gradients):
                parameter -= 0.5 * gradient
    for (name, made), expected in zip(module.named_parameters(), by_hand.parameters()):
        assert torch.equal(made, expected), name
    assert all(torch.equal(mask, masks(by_hand)[name]) for name, mask in masks(module).items())


def test_trainable_parameters_are_exactly_those_of_u_v_and_s2():
    module = Foreign()
    DSEE(r=3, num_sparse=7, positions="random").attach(module)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 2 * ((3 * (32 + 32) + 7) + (3 * (32 + 16) + 7))


def test_a_second_fit_goes_on_in_stage_3_and_other_stages_change_nothing():
    module, callback = Foreign(), DSEE(**SMALL)
    trainer = fit(module, [callback], steps=3)
    before, own = logits(module.net), masks(module)
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    assert torch.equal(logits(module.net), before)
    see = See()
    fit(module, [callback, see], steps=2)
    assert see.pruned == [True, True]
    assert all(torch.equal(mask, own[name]) for name, mask in masks(module).items())


def test_a_fit_that_ends_too_early_says_that_nothing_is_pruned():
    with pytest.warns(UserWarning, match="training ended before step 2, so nothing has been pruned: train longer"):
        fit(Foreign(), [DSEE(**SMALL)], steps=2)


def test_it_learns_under_a_pruned_base():
    """Stage 3 undoes what pruning costs."""
    see = See()
    module = Foreign(lr=0.02)
    settings = {**SMALL, "prune_after": 40, "sparsity": 0.6, "sparsity_others": 0.6, "num_sparse": 100}
    fit(module, [DSEE(**settings), see], steps=80, max_epochs=40)
    assert sum(see.losses[40:44]) > sum(see.losses[36:40])
    assert sum(see.losses[76:]) < sum(see.losses[36:40])


# -- checkpoints and kills --------------------------------------------------------------------------------------------


class Kill(L.Callback):
    """SIGKILL in the backward of a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def staged(folder: str, prune: str, kill: int | None = None, resume: bool = False) -> Any:
    """A run of six steps with dropout whose stages meet at step 2; the losses and what it ends with."""
    L.seed_everything(0, verbose=False)
    module, see = BuiltInInit(optimizer="adamw", dropout=0.1, learning_rate=0.05), See()
    callbacks = [DSEE(**SMALL, prune=prune), see, RandomState(), Kill(None if resume else kill)]
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(**QUIET, max_epochs=2, limit_val_batches=0, callbacks=[*callbacks, saving])
    trainer.fit(module, Rows(batch_size=12), ckpt_path=f"{folder}/step={kill}.ckpt" if resume else None)
    return see.losses, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("prune", KINDS)
def test_stages_survive_kills(prune, tmp_path):
    """One step before the border, just at it, and after: the bits of the run that nobody stopped."""
    losses, whole = staged(str(tmp_path / "whole"), prune)
    for kill in (1, 2, 3):
        folder = str(tmp_path / str(kill))
        code, _ = call_in_child(staged, folder, prune, kill)
        assert code == -signal.SIGKILL
        again, resumed = staged(folder, prune, kill, resume=True)
        assert again == losses[kill:], f"killed in step {kill + 1}"
        assert resumed.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(resumed[key], value), f"killed in step {kill + 1}: {key}"


def test_positions_are_drawn_once_and_not_again_on_resume(tmp_path, monkeypatch):
    calls = []
    original = dsee_module.draw_positions

    def counted(*arguments):
        calls.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(dsee_module, "draw_positions", counted)
    settings = {**SMALL, "positions": "grebsmo"}
    module, callback = Foreign(), DSEE(**settings)
    trainer = fit(module, [callback, ModelCheckpoint(tmp_path, "x")], steps=1)
    trainer.validate(module, loader(), verbose=False)
    assert calls == ["grebsmo"]
    positions = {n: x.dsee_positions.default for n, x in dsee_layers(module, "default").items() if x.dsee_U}
    again = Foreign()
    fit(again, [DSEE(**settings)], steps=2, path=tmp_path, ckpt_path=str(tmp_path / "x.ckpt"))
    fresh = Foreign()
    L.Trainer(**QUIET, enable_checkpointing=False, callbacks=[DSEE(**settings)]).test(
        fresh, loader(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False
    )
    assert calls == ["grebsmo"]
    for other in (again, fresh):
        for name, layer in dsee_layers(other, "default").items():
            assert not layer.dsee_U or torch.equal(layer.dsee_positions.default, positions[name])


@pytest.mark.parametrize("prune", KINDS)
def test_a_delta_holds_the_mask_and_not_the_base(prune, tmp_path):
    module = Foreign()
    fit(module, [DSEE(**SMALL, prune=prune), DeltaCheckpoint(tmp_path, "x")], steps=4)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all("dsee_" in name for name in saved)
    fresh = Foreign()
    DSEE(**SMALL, prune=prune).attach(fresh)
    load_delta(fresh, tmp_path / "x.ckpt")
    assert torch.equal(logits(fresh.net), logits(module.net))
    assert is_pruned(fresh.net, "default")


@pytest.mark.parametrize("prune", KINDS)
def test_what_is_exported_from_a_checkpoint_loads_in_plain_peft(prune, tmp_path):
    module = Foreign()
    fit(module, [DSEE(**SMALL, prune=prune), ModelCheckpoint(tmp_path, "x")], steps=4)
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert torch.equal(logits(theirs), logits(module.net))
    assert is_pruned(theirs, "default")


def test_heads_are_cut_out_of_the_trained_network(tmp_path):
    module = Foreign()
    fit(module, [DSEE(**SMALL, prune="structured")], steps=4)
    expected, before = logits(module.net), sum(p.numel() for p in tiny_llama().parameters())
    remove_heads(module.net)
    torch.testing.assert_close(logits(module.net), expected, rtol=0, atol=1e-5)
    # Of two key-value heads one: half of four [32, 32]-like matrices in two blocks.
    assert sum(p.numel() for p in module.net.parameters()) == before - (32 * 32 + 16 * 32) * 2
    export(module, str(tmp_path))
    plain = type(tiny_llama()).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


# -- other networks and runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", KINDS)
def test_bert_with_its_head(prune):
    module, see = Classifier(), See()
    fit(module, [DSEE(**SMALL, prune=prune), see], steps=4)
    assert see.pruned == [False, False, True, True]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    adapted = {n.rpartition(".")[2] for n, x in dsee_layers(module, "default").items() if x.dsee_U}
    assert adapted == {"query", "value"}


def test_transposed_layers():
    class GPT2(Foreign):
        def build(self):
            self.net = tiny_gpt2()

    module, see = GPT2(), See()
    fit(module, [DSEE(**SMALL), see], steps=4)
    assert see.pruned[-1]
    merged = tuner_of(copy.deepcopy(module.net)).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(module.net), rtol=0, atol=1e-5)


def test_two_adapters_with_stages_of_their_own():
    module = Foreign()
    first = DSEE(**SMALL)
    second = DSEE(
        **{**SMALL, "prune_after": 3}, prune="structured", target_modules=["q_proj", "v_proj"], adapter_name="b"
    )
    assert first.state_key != second.state_key
    seen = []

    class Both(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(tuple(is_pruned(pl_module, name) for name in ("default", "b")))

    fit(module, [first, second, Both()], steps=4)
    assert seen == [(False, False), (False, False), (True, False), (True, True)]


@pytest.mark.parametrize("prune", ["structured", "none"])
def test_a_4_bit_base_trains(prune):
    pytest.importorskip("bitsandbytes")
    module, see = Foreign(hidden=64), See()
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    fit(module, [DSEE(**SMALL, prune=prune, quantization_config=quantization), see], steps=4)
    assert see.pruned == [False, False, prune != "none", prune != "none"]


# -- two processes ----------------------------------------------------------------------------------------------------


def stages_on_two(rank: int, folder: str) -> dict[str, Any]:
    """DDP and FSDP2, whole and resumed from what was saved just after the border; what each rank ends with."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    calls: list[str] = []
    original = dsee_module.draw_positions
    dsee_module.draw_positions = lambda *a: calls.append(a[2]) or original(*a)

    def run(name: str, prune: str, resume: bool = False) -> Any:
        strategy: Any = DDPStrategy(process_group_backend="gloo")
        if name.startswith("fsdp2"):
            whole = name.endswith("file")
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole, process_group_backend="gloo")
        L.seed_everything(rank, verbose=False)  # another on each rank: what is drawn comes from the first
        module = BuiltInConfigureModel(optimizer="adamw")
        path = f"{folder}/{name}-{prune}"
        callback = DSEE(**{**SMALL, "positions": "grebsmo", "prune_after": 1, "prune_unit": "epoch"}, prune=prune)
        made = L.Trainer(
            **QUIET,
            devices=2,
            strategy=strategy,
            max_epochs=2,
            limit_val_batches=1,
            enable_checkpointing=False,
            callbacks=[callback, *([] if resume else [SaveAtBorder(path)])],
        )
        # A plain loader: at an epoch's first batch it has nothing to remember.
        made.fit(module, Rows(batch_size=6, plain=True), ckpt_path=f"{path}/border.ckpt" if resume else None)
        assert IGNORED not in vars(module)
        state = module.state_dict()
        return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for n, v in state.items()}

    answers: dict[str, Any] = {}
    try:
        for name in ("ddp", "fsdp2", "fsdp2-file"):
            for prune in KINDS:
                answers[f"{name} {prune}"] = (run(name, prune), run(name, prune, resume=True))
    finally:
        dsee_module.draw_positions = original
    return {"calls": calls, "runs": answers}


class SaveAtBorder(L.Callback):
    """Checkpoints right after the base was pruned, before the step that follows."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            if isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel):
                sent = {id(buffer) for buffer in trainer.strategy.model.modules_buffers}
                masked = {id(b) for name, b in pl_module.named_buffers() if ".dsee_" in name}
                assert masked and not sent & masked, "DDP sends the masks before every forward"  # noqa: PT018
            trainer.save_checkpoint(f"{self.folder}/border.ckpt")


def test_ranks_draw_once_prune_alike_and_resume_just_after_the_border(tmp_path):
    first, second = run_on_two(stages_on_two, str(tmp_path))
    assert first["calls"] == ["grebsmo"] * 6, "once a run, on rank 0, and not on resume"
    assert second["calls"] == []
    for name, (whole, resumed) in first["runs"].items():
        other, other_resumed = second["runs"][name]
        one = first["runs"][f"ddp {name.split()[1]}"][0]
        pruned = [v for n, v in whole.items() if "dsee_mask" in n or "dsee_columns" in n]
        assert any(not bool((v == (255 if v.dtype == torch.uint8 else 1)).all()) for v in pruned), f"{name}: not pruned"
        for weight, value in whole.items():
            assert torch.equal(value, other[weight]), f"{name}: {weight} differs between ranks"
            assert torch.equal(value, resumed[weight]), f"{name}: {weight} differs after the resume"
            assert torch.equal(value, other_resumed[weight]), name
            torch.testing.assert_close(
                value, one[weight], rtol=0, atol=1e-4, msg=lambda t, n=name, w=weight: f"{n} {w} {t}"
            )


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "stored"}, r"positions='stored' is not known: use one of \('grebsmo', 'random', 'magnitude'\)"),
        ({"prune": "some"}, r"prune='some' is not known"),
        ({"prune_unit": "day"}, r"prune_unit='day' is not known: use one of \('epoch', 'step'\)"),
        ({"score": "W"}, r"score='W' is not known: use one of \('WABS', 'ABS'\)"),
        ({"prune_after": 0}, "prune_after=0: the updates have to train at least one step"),
        ({"sparsity": 1.0}, r"sparsity=1.0 and sparsity_others=0.1 are shares in \[0, 1\)"),
        ({"sparsity": 0.0, "sparsity_others": 0.0}, "not both 0: use prune='none'"),
        ({"r": 0}, "r=0, num_sparse=10 and alpha=8 must be at least 1"),
        ({"num_sparse": 600}, r"num_sparse=600 and a matrix of \[16, 32\] has 512 entries"),
        ({"target_modules": ["nothing"]}, "has no module named 'nothing'"),
        ({"prune": "structured", "heads": 2}, r"heads=2: .* has 2 \(key-value\) heads"),
        ({"prune": "structured", "target_modules": ["q_proj"]}, "v_proj has none: name both in target_modules"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "prune='unstructured' cannot drop entries of weights in 4 or",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DSEE(**{**SMALL, **arguments}).attach(Foreign())
