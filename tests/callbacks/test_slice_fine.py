"""SliceFine: the same numbers as masked full fine-tuning, nothing else moves, and only the slices cost anything."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft.callbacks import DeltaCheckpoint, SliceFine
from lightning_peft.callbacks.slice_fine import slice_start
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.parts import leaves_of
from lightning_peft.roles import weights_by_role
from tests.conformance.data import Rows
from tests.conformance.foreign import BuiltInInit
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

STEPS = 6


def fit(module: L.LightningModule, *callbacks: L.Callback, kind: str = "tokens", **trainer: Any) -> L.Trainer:
    options: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    made = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**options, **quiet, **trainer})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, Rows(kind, batch_size=12))
    return made


def causal(network: nn.Module, optimizer: str = "sgd", **arguments: Any) -> CausalLM:
    rate = 0.1 if optimizer == "sgd" else 0.01
    return CausalLM(network, optimizer=optimizer, learning_rate=rate, lr_scheduler="constant", **arguments)


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


class MaskedFull(L.Callback):
    """Full fine-tuning that keeps the slices alone: after every step all else is as it was. The formula again, by hand.

    Args:
        rank: Columns or rows in a slice.
        interval: Steps of a place.
        kinds: What the places are in turn: "column" or "row" of y = W x.
        stored_in_out: Whether weights are stored as [in, out].
    """

    def __init__(self, rank: int, interval: int, kinds: tuple[str, ...], stored_in_out: bool) -> None:
        self.rank, self.interval, self.kinds, self.stored_in_out = rank, interval, kinds, stored_in_out

    def setup(self, trainer, pl_module, stage):
        self.names = [w.name for w in weights_by_role(pl_module) if w.layout and w.role != "head"]
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in self.names)
        self.before = copied(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        move, dim = divmod((trainer.global_step - 1) // self.interval, len(self.kinds))
        kind = self.kinds[dim]
        for name in self.names:
            weight = pl_module.get_parameter(name)
            along = (0 if kind == "column" else 1) if self.stored_in_out else (1 if kind == "column" else 0)
            size = weight.shape[along]
            places = [(move * self.rank + i) % size for i in range(self.rank)]
            inside = torch.zeros(size, dtype=torch.bool)
            inside[places] = True
            inside = inside[:, None] if along == 0 else inside[None]
            with torch.no_grad():
                weight.copy_(torch.where(inside, weight, self.before[name]))
            self.before[name] = weight.detach().clone()


FAMILIES = {"llama": (tiny_llama, False), "gpt2": (tiny_gpt2, True)}


@pytest.mark.parametrize("orientation", ["column", "row", "alternate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_masked_full_fine_tuning(family, orientation):
    """SGD over two moves, to 1e-6: also on Conv1D, whose weights are stored the other way round."""
    make, transposed = FAMILIES[family]
    kinds = ("column", "row") if orientation == "alternate" else (orientation,)
    made, expected = causal(make()), causal(make())
    fit(made, SliceFine(rank=3, orientation=orientation, interval=2))
    fit(expected, MaskedFull(3, 2, kinds, transposed))
    for name, value in copied(expected).items():
        torch.testing.assert_close(copied(made)[name], value, rtol=0, atol=1e-6)
    assert moved(copied(causal(make())), made)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_masked_full_fine_tuning_with_adamw(family):
    """While the slice stays; decay acts on the slice and on nothing else."""
    make, transposed = FAMILIES[family]
    made, expected = (causal(make(), "adamw", weight_decay=0.5) for _ in range(2))
    fit(made, SliceFine(rank=3, interval=100))
    fit(expected, MaskedFull(3, 100, ("column",), transposed))
    for name, value in copied(expected).items():
        torch.testing.assert_close(copied(made)[name], value, rtol=0, atol=2e-6)


def test_gradient_checkpointing_and_accumulation_change_nothing():
    results = []
    for arguments, trainer in (({}, {}), ({"gradient_checkpointing": True}, {}), ({}, {"accumulate_grad_batches": 3})):
        module = causal(tiny_llama(), **arguments)
        made = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SliceFine(rank=2, orientation="alternate", interval=2)],
            **trainer,
        )
        made.fit(module, Rows(batch_size=12 // trainer.get("accumulate_grad_batches", 1)))
        results.append(copied(module))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", ["column", "row"])
def test_after_k_moves_exactly_k_further_slices_differ(orientation):
    module = causal(tiny_llama(), "adamw", weight_decay=0.1)
    before = copied(module)
    fit(module, SliceFine(rank=2, orientation=orientation, interval=2, start=5))
    sliced = {w.name for w in weights_by_role(module) if w.layout and w.role != "head"}
    assert len(sliced) == 14
    assert moved(before, module) == sliced
    for name in sliced:
        changed = (before[name] != module.state_dict()[name]).any(0 if orientation == "column" else 1)
        assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]  # 6 steps, 2 moves, 3 slices of 2


def test_the_sweep_goes_on_at_the_other_edge():
    module = causal(tiny_llama())
    before = copied(module)
    fit(module, SliceFine(rank=3, interval=3, start=30, target_modules=["q_proj"]))
    for name in moved(before, module):
        changed = (before[name] != module.state_dict()[name]).any(0)
        assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3, 30, 31]


def test_places():
    def starts(**arguments: Any) -> list[int]:
        return [slice_start(turn=turn, rank=3, size=10, **arguments) for turn in range(5)]

    assert starts(order="sweep") == [0, 3, 6, 9, 2]
    assert starts(order="sweep", start=8) == [8, 1, 4, 7, 0]
    assert starts(order="fixed", start=4) == [4] * 5
    drawn = starts(order="random", name="a")
    assert drawn == starts(order="random", name="a")
    assert all(0 <= start < 10 for start in drawn)
    assert len({tuple(starts(order="random", name=n, seed=s)) for n in "abc" for s in (0, 1)}) == 6
    own = starts(order="sweep", start=None, name="a")
    assert [(b - a) % 10 for a, b in itertools.pairwise(own)] == [3] * 4
    assert len({slice_start("sweep", 0, 1, 1000, None, 0, name) for name in "abcdefgh"}) > 4
    everywhere = {slice_start("random", turn, 1, 10, name="a") for turn in range(200)}
    assert everywhere == set(range(10))


# -- cost -------------------------------------------------------------------------------------------------------------


class Held(L.Callback):
    """Bytes that the first backward keeps, and sizes of gradients and moments."""

    def on_train_batch_start(self, *_):
        self.bytes, seen = 0, set()

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def on_before_backward(self, *_):
        self.hooks.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads = {n: p.grad.numel() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, *_):
        (optimizer,) = trainer.optimizers
        self.moments = [state["exp_avg"].numel() for state in optimizer.state.values()]


def test_only_the_slices_cost_anything():
    held = {}
    for rank in (1, 2, 6):
        held[rank] = Held()
        # The first step alone: what it keeps is counted storage by storage.
        fit(causal(tiny_llama(), "adamw"), SliceFine(rank=rank), held[rank], max_steps=1)
    tokens, matrices = 12 * 10, 14
    assert held[2].bytes - held[1].bytes == tokens * matrices * 4  # one further column of each input, fp32
    assert held[6].bytes - held[1].bytes == 5 * tokens * matrices * 4
    rows = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 64, "up": 64, "down": 32}
    for rank in (1, 2, 6):
        assert len(held[rank].grads) == matrices
        assert all(
            size == rank * rows[name.split(".")[-2].removesuffix("_proj")] for name, size in held[rank].grads.items()
        )
        assert sorted(held[rank].moments) == sorted(held[rank].grads.values())
    whole = Held()
    fit(causal(tiny_llama(), "adamw"), whole, max_steps=1)
    assert held[1].bytes < whole.bytes - 100 * tokens * 4


# -- options ----------------------------------------------------------------------------------------------------------


class Moments(L.Callback):
    """Steps that the optimizer has counted for the first leaf, after each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.sizes: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        state = next(iter(trainer.optimizers[0].state.values()))
        self.steps.append(float(state["step"]))


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [1, 2, 1, 2, 1, 2]),
        ({"optimizer_state": "carry"}, [1, 2, 3, 4, 5, 6]),
        ({"order": "fixed"}, [1, 2, 3, 4, 5, 6]),  # it never moves
        ({"orientation": "alternate"}, [1, 2, 1, 2, 1, 2]),
    ],
)
def test_moments_at_a_move(arguments, steps):
    watch = Moments()
    fit(causal(tiny_llama(), "adamw"), SliceFine(interval=2, **arguments), watch)
    assert watch.steps == steps


def test_carried_moments_push_the_next_slice():
    """With no gradient at all a carried first moment still moves the new place; a reset one does not."""

    class Stops(BuiltInInit):
        def loss(self, batch):
            return super().loss(batch) * (self.global_step < 2)

    for state, places in (("carry", [0, 1]), ("reset", [0])):
        module = Stops(optimizer="adamw")
        module.optimizer_class = lambda: torch.optim.Adam
        before = copied(module)
        fit(module, SliceFine(interval=2, optimizer_state=state), max_steps=3)
        name = "model.model.layers.0.mlp.up_proj.weight"
        changed = (before[name] != module.state_dict()[name]).any(0)
        assert changed.nonzero().flatten().tolist() == places


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_vit, tiny_bert])
def test_all_linear_is_peft_s(make):
    import peft

    network = make()
    task = "SEQ_CLS" if make in (tiny_bert, tiny_vit) else None
    made = peft.get_peft_model(
        copy.deepcopy(network), peft.LoraConfig(r=1, target_modules="all-linear", task_type=task)
    )
    adapted = {name.split(".lora_A")[0] for name, _ in made.named_modules() if name.endswith("lora_A")}
    adapted = {name.removeprefix("base_model.model.") for name in adapted}
    own = {w.name.removesuffix(".weight") for w in SliceFine().targets(weights_by_role(network))}
    assert own == adapted - ({"classifier"} if make is tiny_vit else set())  # PEFT's task knows no image classifiers


def test_target_modules_by_name_and_pattern():
    weights = weights_by_role(causal(tiny_llama()))

    def targets(given: Any) -> set[str]:
        found = {w.name for w in SliceFine(target_modules=given).targets(weights)}
        return {name.removeprefix("model.model.layers.").removesuffix(".weight") for name in found}

    assert targets(["q_proj", "mlp.up_proj"]) == {
        *(f"{i}.self_attn.q_proj" for i in range(2)),
        *(f"{i}.mlp.up_proj" for i in range(2)),
    }
    assert targets(r"layers\.1\..*_proj") == {
        *(f"1.self_attn.{p}_proj" for p in "qkvo"),
        *(f"1.mlp.{p}_proj" for p in ("gate", "up", "down")),
    }


def test_biases_and_modules_that_train_whole():
    name = "model.model.layers.0.self_attn.q_proj"
    for arguments, expected in (
        ({}, {f"{name}.weight"}),
        ({"train_bias": True}, {f"{name}.weight", f"{name}.bias"}),
        ({"modules_to_save": ["lm_head", "layers.1.mlp"]}, {f"{name}.weight", "model.lm_head.weight"}),
    ):
        module = causal(tiny_llama(attention_bias=True))
        before = copied(module)
        fit(module, SliceFine(target_modules=r".*layers\.0\..*q_proj", **arguments), max_steps=2)
        whole = {f"model.model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        assert moved(before, module) == expected | (whole if "modules_to_save" in arguments else set())


def test_a_classification_head_trains_whole():
    for given, whole in ((None, True), ([], False)):
        module = SequenceClassifier(tiny_bert(), learning_rate=0.1, lr_scheduler="constant", optimizer="sgd")
        before = copied(module)
        fit(module, SliceFine(modules_to_save=given), kind="classes", max_steps=2)
        changed = moved(before, module)
        assert ("model.classifier.weight" in changed) is whole
        assert "model.bert.pooler.dense.weight" in changed
        assert "model.bert.embeddings.word_embeddings.weight" not in changed
        if whole:
            assert (before["model.classifier.weight"] != module.state_dict()["model.classifier.weight"]).all()


def test_a_network_without_blocks():
    class Layers(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 10))
            self.beside = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layers(batch["input_ids"].float() / 64).square().mean() + self.beside.weight.square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Layers()
    before = copied(module)
    fit(module, SliceFine(rank=2), max_steps=2)
    assert moved(before, module) == {"layers.0.weight", "layers.2.weight"}


def test_bf16_mixed_trains_the_same_slices():
    module = causal(tiny_llama(), "adamw")
    before = copied(module)
    fit(module, SliceFine(rank=2, interval=3), precision="bf16-mixed")
    for name in moved(before, module):
        changed = (before[name] != module.state_dict()[name]).any(0)
        assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert module.state_dict()["model.lm_head.weight"].dtype == torch.float32


def test_picture_shows_how_much_has_trained(tmp_path):
    module = causal(tiny_llama())
    callback = SliceFine(rank=4, orientation="alternate", interval=2, picture=True)
    fit(module, callback, default_root_dir=tmp_path)
    (png,) = tmp_path.rglob("*.png")
    assert png.read_bytes()[:4] == b"\x89PNG"
    up = next(w for w in weights_by_role(module) if w.name.endswith("0.mlp.up_proj.weight"))
    # 4, and later 4 more, of its 32 columns; in between 4 of its 64 rows
    assert callback.share(up) == pytest.approx(1 - (1 - 8 / 32) * (1 - 4 / 64))
    norm = next(w for w in weights_by_role(module) if w.role == "norm")
    assert callback.share(norm) == 0


def test_delta_checkpoints_hold_what_was_sliced(tmp_path):
    module = causal(tiny_llama())
    delta = DeltaCheckpoint(dirpath=tmp_path, filename="delta")
    fit(module, SliceFine(target_modules=["q_proj"]), delta, enable_checkpointing=True)
    state = torch.load(tmp_path / "delta.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_mid_run_checkpoints_export_to_plain_transformers(tmp_path):
    from transformers import LlamaForCausalLM

    from lightning_peft.export import export

    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    module = causal(tiny_llama())
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module, SliceFine(rank=4, interval=2), saving, enable_checkpointing=True)
    export(str(tmp_path / "step=3.ckpt"), str(tmp_path / "out"), base=str(base))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])
    assert not any(leaves_of(part) for part in module.modules())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank=0 must be at least 1"),
        ({"interval": 0}, r"interval=0 must be a number of optimizer steps of at least 1"),
        ({"orientation": "diagonal"}, r"orientation='diagonal' is not known.*column.*row.*alternate"),
        ({"order": "spiral"}, r"order='spiral' is not known.*sweep.*random.*fixed"),
        ({"start": -1}, r"start=-1 must be 0 or more, or null"),
        ({"optimizer_state": "keep"}, r"optimizer_state='keep' is not known.*reset.*carry"),
        ({"optimizer_state": "carry", "orientation": "alternate"}, r"a column's moments are no row's"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SliceFine(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 33}, r"rank=33 is more than the 32 columns of model\.model\.layers\.0\.self_attn\.q_proj\.weight"),
        ({"rank": 17, "orientation": "row"}, r"rank=17 is more than the 16 rows of .*k_proj\.weight"),
        ({"target_modules": ["q_porj"]}, r"no linear layer matches 'q_porj'.*closest: .*q_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"no linear layer matches 'embed_tokens'"),
        ({"target_modules": ["lm_head"]}, r"'lm_head' \(the output head is never sliced"),
        ({"target_modules": r".*\.99\..*"}, r"no linear layer matches"),
        ({"modules_to_save": ["haed"]}, r"modules_to_save: there is no module named 'haed'; closest: lm_head"),
    ],
)
def test_refuses_what_does_not_fit_the_network(arguments, message):
    module = causal(tiny_llama())
    with pytest.raises(ValueError, match=message):
        fit(module, SliceFine(**arguments), max_steps=1)
    assert not any(leaves_of(part) for part in module.modules())
