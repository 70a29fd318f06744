"""Concept ablation: the projection, its gradients, what acts when, and the good cue learnt instead of the bad."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks import PEFT, ConceptAblation
from lightning_peft.callbacks.concept_ablation import orthonormal_basis, project_out
from lightning_peft.concepts import save_directions
from tests.callbacks.test_half_finetuning import causal, copied, fit
from tests.conformance.data import Rows
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama

ROWS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def given(rows: torch.Tensor, layer: int = 0) -> dict[str, list[list[float]]]:
    return {str(layer): rows.tolist()}


# -- the projection ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_along_the_directions_and_the_rest_is_unchanged():
    hidden, basis = torch.randn(2, 5, 32), orthonormal_basis(ROWS)
    made = project_out(hidden, basis)
    torch.testing.assert_close(made @ basis, torch.zeros(2, 5, 3), rtol=0, atol=1e-5)
    exact = ROWS.double()
    projector = torch.eye(32).double() - exact.T @ torch.linalg.inv(exact @ exact.T) @ exact
    torch.testing.assert_close(made.double(), hidden.double() @ projector, rtol=0, atol=1e-5)
    torch.testing.assert_close(project_out(made, basis), made, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        torch.cat([ROWS, ROWS]),
        torch.cat([ROWS[:1], ROWS[:1], ROWS[1:]]),  # a QR decomposition's second column is arbitrary here
        torch.cat([2 * ROWS[:1], ROWS[:1] + 1e-3 * ROWS[1:2], ROWS[2:]]),
        torch.cat([torch.zeros(1, 32), 1e4 * ROWS]),
    ],
    ids=["twice", "repeated first", "nearly parallel", "zero and long"],
)
def test_directions_that_depend_on_each_other_give_the_projector_of_their_span(rows):
    hidden = torch.randn(7, 32)
    torch.testing.assert_close(
        project_out(hidden, orthonormal_basis(rows)), project_out(hidden, orthonormal_basis(ROWS)), rtol=0, atol=1e-3
    )
    assert orthonormal_basis(rows).shape == (32, 3)


def test_autocast_does_not_round_what_is_taken_away():
    hidden, basis = torch.randn(4, 32), orthonormal_basis(ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        made = project_out(hidden, basis)
    assert torch.equal(made, project_out(hidden, basis))


# -- in training ------------------------------------------------------------------------------------------------------


class See(L.Callback):
    """What block 0 hands on and what gradient comes back to it, in training and in validation."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[torch.Tensor]] = {"training": [], "sanity": [], "validating": []}
        self.gradients: list[torch.Tensor] = []

    def on_fit_start(self, trainer, pl_module):
        block = next(m for name, m in pl_module.named_modules() if name.endswith(("layers.0", "h.0", "layer.0")))

        def see(_, args, output):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            kind = "training" if trainer.training else "sanity" if trainer.sanity_checking else "validating"
            self.outputs[kind].append(hidden.detach())
            if hidden.requires_grad:
                hidden.register_hook(lambda g: self.gradients.append(g))

        self.handle = block.register_forward_hook(see)

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_stream_and_the_gradient_have_no_part_along_the_directions_in_training_alone(make):
    see, ablation = See(), ConceptAblation(given(ROWS))
    module = causal(make())
    fit(module, None, callbacks=[ablation, see], max_steps=3)
    for hidden in see.outputs["training"]:
        assert float((hidden @ ROWS.T).abs().max()) < 1e-4
    assert see.outputs["validating"]
    assert min(float((hidden @ ROWS.T).abs().max()) for hidden in see.outputs["validating"]) > 1e-2
    assert not any(block._forward_hooks for block in module.modules())


def test_gradients_that_reach_the_block_are_orthogonal():
    module = causal(tiny_llama())
    seen = []
    ablation = ConceptAblation(given(ROWS))

    class Watch(L.Callback):  # the block's own output, before the projection
        def on_fit_start(self, trainer, pl_module):
            down = pl_module.model.model.layers[0].mlp.down_proj
            down.register_forward_hook(
                lambda _, __, out: out.register_hook(seen.append) and None if trainer.training else None
            )

    fit(module, None, callbacks=[ablation, Watch()])
    assert seen
    assert all(float((g @ ROWS.T).abs().max()) < 1e-6 * 32 for g in seen)
    assert all(float(g.abs().max()) > 1e-6 for g in seen)


def test_on_validation_too_if_asked():
    see = See()
    fit(
        causal(tiny_llama()),
        None,
        callbacks=[ConceptAblation(given(ROWS), ablate_on_validation=True), see],
        max_steps=3,
    )
    assert see.outputs["validating"]
    assert all(float((hidden @ ROWS.T).abs().max()) < 1e-4 for hidden in see.outputs["validating"])


def test_no_direction_is_no_callback():
    made = []
    for callbacks in ([ConceptAblation({"0": []})], []):
        module = causal(tiny_llama())
        fit(module, None, callbacks=callbacks)
        made.append(copied(module))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_the_same_under_lora_and_activation_checkpointing():
    """Blocks are found through PEFT's wrapping, and the recomputation projects as the forward did."""
    made = []
    for checkpointing in (False, True):
        L.seed_everything(0, verbose=False)
        module = causal(tiny_llama(), gradient_checkpointing=checkpointing, optimizer="sgd")
        see = See()
        lora = PEFT({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]})
        fit(module, None, callbacks=[lora, ConceptAblation(given(ROWS), positions="learnt"), see])
        made.append(copied(module))
    assert any("lora_B" in name and value.any() for name, value in made[0].items())
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "acts"),
    [
        ("learnt", lambda labels: labels != -100),
        ("prompt", lambda labels: labels == -100),
        (
            [0, -1, 99],
            lambda labels: torch.zeros_like(labels, dtype=torch.bool).index_fill(
                1, torch.tensor([0, labels.shape[1] - 1]), True
            ),
        ),
    ],
)
def test_at_chosen_positions_alone(positions, acts):
    see, batches = See(), []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch["labels"])

    fit(causal(tiny_llama()), None, callbacks=[ConceptAblation(given(ROWS), positions=positions), see, Keep()])
    for hidden, labels in zip(see.outputs["training"], batches, strict=True):
        along = (hidden @ ROWS.T).abs().amax(-1)
        where = acts(labels)
        assert where.any()
        assert (~where).any()
        assert float(along[where].max()) < 1e-4
        assert float(along[~where].min()) > 1e-4


# -- the claim --------------------------------------------------------------------------------------------------------


class Cued(L.LightningModule):
    """A token says the label; and block 0's output says it too, loudly, along a direction of its own."""

    def __init__(self, bad: torch.Tensor) -> None:
        super().__init__()
        self.model = tiny_bert(layers=3)
        self.sign = torch.zeros(1)
        self.model.bert.encoder.layer[0].register_forward_hook(
            lambda _, __, out: out + 2 * self.sign[:, None, None] * bad
        )

    def logits(self, ids: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        self.sign = sign
        return self.model(ids).logits

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        return nn.functional.cross_entropy(self.logits(ids, 2.0 * labels - 1), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def cued_rows(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    ids = torch.randint(30, 100, (n, 8), generator=generator)
    ids[:, 1] = 10 + labels
    return ids, labels


def reversed_accuracy(bad: torch.Tensor, callbacks: list[L.Callback]) -> float:
    """Trained where both cues agree; tested, unablated, where the loud one says the opposite."""
    L.seed_everything(0, verbose=False)
    module = Cued(bad)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=8, logger=False, callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(*cued_rows(192, 0)), batch_size=16, shuffle=True))
    ids, labels = cued_rows(64, 1)
    with torch.no_grad():
        made = module.eval().logits(ids, 1 - 2.0 * labels)
    return float((made.argmax(1) == labels).float().mean())


def test_the_good_cue_is_learnt_instead_of_the_bad_one():
    bad = nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=0)
    assert reversed_accuracy(bad, []) < 0.2
    assert reversed_accuracy(bad, [ConceptAblation(given(bad[None]))]) > 0.95
    # The control: another direction does not help.
    assert reversed_accuracy(bad, [ConceptAblation("random", layers=[0])]) < 0.2


# -- state and refusals -----------------------------------------------------------------------------------------------


def test_a_file_a_report_and_layers(tmp_path):
    path = save_directions(tmp_path / "d.safetensors", {0: ROWS, 1: ROWS[:2]})
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps([{"layer": 0, "direction": 1, "ablate": True}, {"layer": 1, "direction": 0, "ablate": False}])
    )
    for arguments, expected in (
        ({}, {0: ROWS, 1: ROWS[:2]}),
        ({"layers": [1]}, {1: ROWS[:2]}),
        ({"report": str(report)}, {0: ROWS[[1]]}),
    ):
        callback = ConceptAblation(str(path), **arguments)
        fit(causal(tiny_llama()), None, callbacks=[callback], max_steps=1)
        assert callback.bases.keys() == expected.keys()
        for layer, rows in expected.items():
            assert torch.equal(callback.bases[layer], orthonormal_basis(rows))


def test_the_basis_is_in_the_checkpoint_and_the_file_may_have_gone(tmp_path):
    path = save_directions(tmp_path / "d.safetensors", {0: ROWS})
    saving = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2, save_top_k=1, monitor=None)
    whole, resumed = causal(tiny_llama()), causal(tiny_llama())
    options = {"max_steps": 4, "enable_checkpointing": True}
    fit(whole, None, callbacks=[ConceptAblation(str(path)), saving, Stop()], **options)
    path.unlink()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=4, callbacks=[ConceptAblation(str(path))], **quiet)
    trainer.fit(resumed, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / "kept.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


class Stop(L.Callback):
    """Keeps the checkpoint of step 2 under another name."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            folder = Path(trainer.checkpoint_callback.dirpath)
            (folder / "half.ckpt").rename(folder / "kept.ckpt")


@pytest.mark.parametrize(
    ("directions", "arguments", "message"),
    [
        (given(ROWS, 5), {}, "layer 5 is not there: CausalLM has 2 blocks, 0 to 1"),
        (given(ROWS[:, :8]), {}, "8 numbers wide, and the residual stream of CausalLM is 32"),
        (given(torch.eye(32)), {}, "layer 0 has 32 independent directions of 32"),
        (given(ROWS), {"layers": [1]}, r"layers names \[1\], and there are directions for \[0\] only"),
        ("none.safetensors", {}, "there is no such file"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_at_the_start(directions, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit(causal(tiny_llama()), None, callbacks=[ConceptAblation(directions, **arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "answer"}, "positions='answer' is not known"),
        ({"directions": "random"}, "needs layers="),
        ({"components": 0}, "components=0"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConceptAblation(**{"directions": given(ROWS), **arguments})
