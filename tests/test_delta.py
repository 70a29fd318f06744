"""Delta checkpoints: what is in them, what they refuse, and that a run goes on from one as if it had never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_peft.callbacks.delta_checkpoint import DeltaCheckpoint
from lightning_peft.callbacks.peft import PEFT
from lightning_peft.callbacks.random_state import RandomState
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.delta import digest, load_delta
from tests.adapted import LORA, QUIET, BuiltLater, Classifier, Foreign, Rows, fit, loader, logits
from tests.processes import call_in_child

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def saved(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def every(path: Path, steps: int = 1, **kwargs) -> DeltaCheckpoint:
    return DeltaCheckpoint(dirpath=path, every_n_train_steps=steps, save_top_k=-1, filename="{step}", **kwargs)


def test_digest_sees_every_byte_shape_and_dtype():
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    other = weight.clone()
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(99.0))
    all_of_them = [weight, other, weight.view(4, 3), weight.to(torch.bfloat16), weight.view(torch.int32), weight.T]
    assert len({digest(t) for t in all_of_them}) == len(all_of_them)
    assert digest(weight.T) == digest(weight.T.contiguous())
    assert digest(torch.zeros(())) != digest(torch.zeros(0))


@pytest.mark.parametrize("module_class", [Foreign, BuiltLater])
def test_a_delta_holds_the_adapter_alone(tmp_path, module_class):
    module = module_class()
    fit(
        module,
        [
            PEFT(LORA),
            DeltaCheckpoint(dirpath=tmp_path, filename="delta"),
            ModelCheckpoint(tmp_path, "full", every_n_train_steps=4),
        ],
    )
    delta, full = saved(tmp_path / "delta.ckpt"), saved(tmp_path / "full.ckpt")
    assert set(delta["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert set(full["state_dict"]) == set(module.state_dict())
    assert all(torch.equal(full["state_dict"][k], v) for k, v in delta["state_dict"].items())
    assert set(delta["delta"]["left_out"]) | set(delta["state_dict"]) == set(full["state_dict"])
    for part in ("optimizer_states", "lr_schedulers", "loops", "callbacks", "hyper_parameters"):
        assert part in delta


def test_what_trained_and_is_frozen_now_is_in_it(tmp_path):
    """A selection moves: the first block trains in the first epoch, the second from then on."""

    class Moves(L.Callback):
        def setup(self, trainer, pl_module, stage):
            self.choose(pl_module, 0)

        def on_train_epoch_start(self, trainer, pl_module):
            self.choose(pl_module, trainer.current_epoch)

        def choose(self, pl_module, block):
            pl_module.requires_grad_(False)
            pl_module.net.model.layers[block].requires_grad_(True)

    module = Foreign()
    fit(module, [Moves(), DeltaCheckpoint(dirpath=tmp_path, filename="delta")], steps=8)
    names = set(saved(tmp_path / "delta.ckpt")["state_dict"])
    assert {n for n in module.state_dict() if ".layers." in n} == names
    other = Foreign()
    load_delta(other, tmp_path / "delta.ckpt")
    assert torch.equal(logits(other.net), logits(module.net))


def test_what_an_adapter_wrote_into_the_base_is_in_it(tmp_path):
    config = {**LORA, "init_lora_weights": "pissa_niter_2"}  # a random SVD: a second one gives other residuals
    module = Foreign()
    fit(module, [PEFT(config), DeltaCheckpoint(dirpath=tmp_path, filename="delta")])
    names = set(saved(tmp_path / "delta.ckpt")["state_dict"])
    assert sum(name.endswith("base_layer.weight") for name in names) == 4
    other = Foreign()
    torch.manual_seed(99)
    PEFT(config).attach(other)
    load_delta(other, tmp_path / "delta.ckpt")
    assert torch.equal(logits(other.net), logits(module.net))


def test_buffers_that_move_are_in_it(tmp_path):
    class Normed(Foreign):
        def build(self):
            self.net = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.Linear(16, 128))

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch["ids"]), batch["ids"].flatten())

    module = Normed()
    fit(module, [PEFT({"peft_type": "LORA", "target_modules": ["3"]}), DeltaCheckpoint(dirpath=tmp_path, filename="d")])
    state = saved(tmp_path / "d.ckpt")["state_dict"]
    assert torch.equal(state["net.2.running_mean"], module.net[2].running_mean)


def resumable(path: Path, steps: int, resume: str | None, config: dict, checkpoint, extra: tuple = ()) -> Foreign:
    module = Foreign(dropout=0.2)
    trainer = L.Trainer(
        **QUIET, max_steps=steps, default_root_dir=path, callbacks=[PEFT(config), RandomState(), checkpoint, *extra]
    )
    trainer.fit(module, LookAheadDataLoader(Rows(), batch_size=4, shuffle=True), ckpt_path=resume)
    return module


RESUMED = [
    {**LORA, "lora_dropout": 0.1},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    {**LORA, "init_lora_weights": "pissa_niter_2"},
]


@pytest.mark.parametrize("config", RESUMED, ids=["lora", "prefix", "pissa"])
@pytest.mark.parametrize("stop", [3, 4, 5])  # in mid-epoch, at its end (4 batches), just after
def test_resumed_from_a_delta_equals_uninterrupted_bit_for_bit(tmp_path, config, stop):
    L.seed_everything(5)
    whole = resumable(tmp_path, 7, None, config, every(tmp_path / "whole"))
    L.seed_everything(5)
    resumable(tmp_path, stop, None, config, every(tmp_path / "killed"))
    L.seed_everything(99)  # another process draws another fresh adapter
    path = str(tmp_path / "killed" / f"step={stop}.ckpt")
    resumed = resumable(tmp_path, 7, path, config, every(tmp_path / "resumed"))
    trained = [n for n, p in whole.named_parameters() if p.requires_grad]
    assert trained
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def _killed_run(path: str, step: int) -> None:
    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    L.seed_everything(5)
    torch.set_num_threads(1)
    resumable(Path(path), 7, None, RESUMED[0], every(Path(path)), (Kill(),))


@pytest.mark.parametrize("step", [2, 6])
def test_kill_minus_nine_and_resume(tmp_path, step):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    L.seed_everything(5)
    whole = resumable(tmp_path, 7, None, RESUMED[0], every(tmp_path / "whole"))
    code, _ = call_in_child(_killed_run, str(tmp_path / "killed"), step)
    assert code == -signal.SIGKILL
    newest = max((tmp_path / "killed").glob("*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
    assert int(newest.stem.partition("=")[2]) < step + 1
    L.seed_everything(99)
    resumed = resumable(tmp_path, 7, str(newest), RESUMED[0], every(tmp_path / "resumed"))
    torch.set_num_threads(threads)
    assert all(torch.equal(v, resumed.state_dict()[n]) for n, v in whole.state_dict().items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_delta_is_tested(tmp_path, weights_only):
    module, callback = Foreign(lr=3e-2), PEFT(LORA)
    best = DeltaCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_weights_only=weights_only)
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=[callback, best])
    trainer.fit(module, loader(), loader())
    tested = trainer.test(module, loader(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert tested == pytest.approx(float(best.best_model_score), abs=1e-6)
    anew = Foreign()
    trainer = L.Trainer(**QUIET, callbacks=[PEFT(LORA)])  # PEFT alone knows deltas, too
    again = trainer.test(anew, loader(), ckpt_path=best.best_model_path, verbose=False)[0]["test_loss"]
    assert again == pytest.approx(tested, abs=1e-6)


def test_averaged_weights_go_through_a_delta(tmp_path):
    ema = EMAWeightAveraging(decay=0.5)
    fit(Foreign(), [PEFT(LORA), ema, DeltaCheckpoint(dirpath=tmp_path, filename="d")], steps=3)
    checkpoint = saved(tmp_path / "d.ckpt")
    assert set(checkpoint["current_model_state"]) == set(checkpoint["state_dict"])
    assert all("lora_" in name for name in checkpoint["state_dict"])
    whole = Foreign()
    fit(whole, [PEFT(LORA), EMAWeightAveraging(decay=0.5)], steps=8)
    module = Foreign()
    fit(module, [PEFT(LORA), EMAWeightAveraging(decay=0.5)], steps=8, ckpt_path=str(tmp_path / "d.ckpt"))
    assert any("lora_B" in n and float(p.detach().abs().sum()) > 0 for n, p in module.named_parameters())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_delta(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("delta")
    fit(Foreign(), [PEFT({**LORA, "layers_to_transform": [0]}), DeltaCheckpoint(dirpath=path, filename="d")])
    return str(path / "d.ckpt")


class OtherBase(Foreign):
    def build(self):
        super().build()
        with torch.no_grad():
            self.net.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (
            Foreign,
            {**LORA, "layers_to_transform": [1]},
            r"has weights that are not in it: net.model.layers.*this model lacks: net.model.layers.0.*lora_A",
        ),
        (Foreign, LORA, "this model has weights that are not in it"),
        (
            Foreign,
            {**LORA, "r": 2, "layers_to_transform": [0]},
            r"lora_A.default.weight as \[4, 32\] and this model as \[2, 32\]",
        ),
        (
            OtherBase,
            {**LORA, "layers_to_transform": [0]},
            r"another base.*1 of the .* differ here: net.model.layers.1.mlp.up_proj.weight",
        ),
    ],
    ids=["layer", "more", "rank", "base"],
)
@pytest.mark.parametrize("way", ["fit", "test", "load_delta"])
def test_a_delta_of_another_model_is_refused(a_delta, module, config, message, way):
    made, callback = module(), PEFT(config)

    def load() -> None:
        if way == "load_delta":
            callback.attach(made)
            load_delta(made, a_delta)
        elif way == "fit":
            fit(made, [callback], ckpt_path=a_delta)
        else:
            L.Trainer(**QUIET, callbacks=[callback]).test(made, loader(), ckpt_path=a_delta, verbose=False)

    for strict in (True, False):
        made.strict_loading = strict
        with pytest.raises(ValueError, match=message):
            load()


def test_a_delta_that_lost_a_trained_weight_is_refused(a_delta, tmp_path):
    checkpoint = saved(a_delta)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, tmp_path / "d.ckpt")
    module = Foreign()
    module.strict_loading = False
    with pytest.raises(ValueError, match=r"lacks weights that it names itself: net.model.layers.0.*lora"):
        fit(module, [PEFT({**LORA, "layers_to_transform": [0]})], ckpt_path=str(tmp_path / "d.ckpt"))


def test_without_its_callbacks_lightning_refuses_a_delta(a_delta):
    with pytest.raises(RuntimeError, match="Missing key"):
        L.Trainer(**QUIET).test(Foreign(), loader(), ckpt_path=a_delta, verbose=False)


# -- a quantised base -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [ModelCheckpoint, DeltaCheckpoint])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_quantised_base_is_never_in_a_checkpoint(tmp_path, checkpoint, weights_only):
    pytest.importorskip("bitsandbytes")
    module = Foreign(hidden=64)
    file = checkpoint(dirpath=tmp_path, filename="x", save_weights_only=weights_only)
    trainer = fit(module, [PEFT(LORA, quantization_config=NF4), file])
    trainer.save_checkpoint(tmp_path / "y.ckpt")
    for name in ("x", "y"):
        state = saved(tmp_path / f"{name}.ckpt")["state_dict"]
        assert not any("base_layer" in key or "mlp" in key for key in state)
        assert any("lora_A" in key for key in state)
    other = Foreign(hidden=64)
    PEFT(LORA, quantization_config=NF4).attach(other)
    load_delta(other, tmp_path / "x.ckpt")
    assert torch.equal(logits(other.net), logits(module.net))


def test_a_quantised_run_resumes_and_checks_its_base(tmp_path):
    pytest.importorskip("bitsandbytes")

    def run(module, steps, resume=None):
        callbacks = [
            PEFT(LORA, quantization_config=NF4),
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
        ]
        trainer = L.Trainer(**QUIET, max_steps=steps, callbacks=callbacks)
        trainer.fit(module, LookAheadDataLoader(Rows(), batch_size=4), ckpt_path=resume)
        return module

    torch.manual_seed(1)
    whole = run(Foreign(hidden=64), 6)
    path = str(tmp_path / "step=3.ckpt")
    resumed = run(Foreign(hidden=64), 6, path)
    own = dict(resumed.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in whole.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="trained on another base"):
        run(OtherBase(hidden=64), 6, path)


def test_a_classifiers_random_head_does_not_stop_a_resume(tmp_path):
    config = {"peft_type": "LORA", "target_modules": ["query"]}
    module = Classifier()
    fit(module, [PEFT(config), DeltaCheckpoint(dirpath=tmp_path, filename="d")])
    other = Classifier()
    nn.init.normal_(other.net.classifier.weight)  # drawn anew by another process
    PEFT(config).attach(other)
    load_delta(other, tmp_path / "d.ckpt")
    assert torch.equal(logits(other.net), logits(module.net))
