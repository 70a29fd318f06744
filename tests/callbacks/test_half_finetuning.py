"""Half fine-tuning on networks: exact counts, what moves, optimizer state, activations, rounds, refusals."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.callbacks import HalfFineTuning
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.roles import weights_by_role
from tests.conformance.data import Rows
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral

CATEGORIES = {"attention": "attention", "ffn": "ffn", "expert": "ffn", "norm": "norm"}


def fit(module: L.LightningModule, callback: HalfFineTuning, kind: str = "tokens", **trainer: Any) -> L.Trainer:
    options: dict[str, Any] = {"max_steps": 2, "logger": False, "callbacks": [callback]}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = L.Trainer(accelerator="cpu", **{**options, **quiet, **trainer})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, Rows(kind, batch_size=12))
    return made


def causal(network: torch.nn.Module, **arguments: Any) -> CausalLM:
    return CausalLM(network, lr_scheduler="constant", learning_rate=0.01, **arguments)


def trained(module: L.LightningModule, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


#: Per block: attention, feed-forward, norms; over the model of four blocks the half of each.
FAMILIES = {
    "llama": (tiny_llama, "tokens", (4, 3, 2), {"attention": 8, "ffn": 6, "norm": 4}),
    "gpt2": (tiny_gpt2, "tokens", (2, 2, 2), {"attention": 4, "ffn": 4, "norm": 4}),
    "bert": (tiny_bert, "classes", (4, 2, 2), {"attention": 8, "ffn": 4, "norm": 4}),
    "mixtral": (tiny_mixtral, "tokens", (4, 2, 2), {"attention": 8, "ffn": 4, "norm": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_half_moves(family):
    make, kind, sizes, expected = FAMILIES[family]
    wrap = SequenceClassifier if kind == "classes" else causal
    module = wrap(make(layers=4))
    weights = [w for w in weights_by_role(module) if w.block is not None and not w.is_bias]
    before = copied(module)
    fit(module, HalfFineTuning(train_embeddings=False), kind)
    moved = trained(module, before)
    counts: Counter[str] = Counter()
    by_block: dict[Any, Counter[str]] = {}
    for weight in weights:
        category = CATEGORIES.get(weight.role.partition(".")[0])
        if category and weight.name in moved:
            counts[category] += 1
            by_block.setdefault(weight.block, Counter())[category] += 1
    assert counts == expected
    for block in by_block.values():
        for category, size in zip(("attention", "ffn", "norm"), sizes):
            assert size // 2 <= block[category] <= size - size // 2
    outside = {w.name: w.role for w in weights_by_role(module) if w.block is None}
    assert not {name for name, role in outside.items() if role in ("embedding", "head")} & moved
    assert {name for name, role in outside.items() if role == "norm"} <= moved


def test_embeddings_and_head_train_by_default():
    module = causal(tiny_llama())
    before = copied(module)
    fit(module, HalfFineTuning())
    assert {"model.model.embed_tokens.weight", "model.lm_head.weight"} <= trained(module, before)


def test_tied_embeddings_are_one_parameter():
    module = causal(tiny_llama(tie=True))
    before = copied(module)
    fit(module, HalfFineTuning(train_embeddings=False))
    assert not {"model.model.embed_tokens.weight", "model.lm_head.weight"} & trained(module, before)
    fit(module, HalfFineTuning())
    assert {"model.model.embed_tokens.weight", "model.lm_head.weight"} <= trained(module, before)


def test_optimizer_state_is_for_the_trained_half_alone():
    """Of full fine-tuning's with embeddings frozen: at most 0.55, here the half of the blocks."""

    class Size(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            names = {id(p): name for name, p in pl_module.named_parameters()}
            (optimizer,) = trainer.optimizers
            self.held = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
            self.bytes = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())

    module, half, full = causal(tiny_llama(layers=4)), Size(), Size()
    before = copied(module)
    fit(module, HalfFineTuning(train_embeddings=False), callbacks=[HalfFineTuning(train_embeddings=False), half])
    assert half.held == trained(module, before)
    fit(causal(tiny_llama(layers=4)), HalfFineTuning(), callbacks=[full])
    assert half.bytes <= 0.55 * full.bytes


def test_activations_of_frozen_matrices_are_not_kept():
    """`down` alone reads the feed-forward's product: kept where it trains, not where it is frozen."""
    module = causal(tiny_llama(layers=4))
    blocks = module.model.model.layers
    inputs: dict[str, int] = {}
    kept: set[int] = set()
    alive = []

    def see(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            inputs[name] = args[0].untyped_storage().data_ptr()
            alive.append(args[0])  # or its place in memory is given to another

        return hook

    class Enough(Exception):
        pass

    class Hooks(L.Callback):
        def on_before_backward(self, *_):
            raise Enough  # the first forward has been seen

    handles = [b.mlp.down_proj.register_forward_pre_hook(see(f"{i}")) for i, b in enumerate(blocks)]
    callback = HalfFineTuning(train_embeddings=False)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(Enough):
        fit(module, callback, callbacks=[callback, Hooks()])
    trains = {f"{i}": b.mlp.down_proj.weight.requires_grad for i, b in enumerate(blocks)}
    assert set(trains.values()) == {True, False}
    assert {name: place in kept for name, place in inputs.items()} == trains
    for handle in handles:
        handle.remove()


def halves(reselect: str, seed: int = 0) -> list[frozenset[str]]:
    """What trained in each of two fits of two epochs."""
    module, callback = causal(tiny_llama(layers=4)), HalfFineTuning(reselect=reselect, seed=seed)
    seen = []

    class See(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(frozenset(callback.state_dict()["selected"]))

    for _ in range(2):
        fit(module, callback, callbacks=[callback, See()], max_steps=-1, max_epochs=2)
    return seen


def test_when_a_new_half_is_drawn():
    never, epoch, stage = halves("never"), halves("epoch"), halves("stage")
    assert len(set(never)) == 1
    assert len(set(epoch)) >= 3  # a fit's first epoch goes on with the half of the last
    assert stage[0] == stage[1] != stage[2] == stage[3]
    assert never[0] == epoch[0] == stage[0]  # the round and the seed decide, nothing else
    assert halves("stage") == stage
    assert halves("stage", seed=1) != stage


def test_what_trains_is_counted_and_logged(tmp_path):
    module = causal(tiny_llama(layers=4))
    logger = CSVLogger(tmp_path, name=None, version="")
    fit(module, HalfFineTuning(train_embeddings=False), logger=logger, log_every_n_steps=1)
    row = (tmp_path / "metrics.csv").read_text().splitlines()
    values = dict(zip(row[0].split(","), row[1].split(",")))
    total = sum(p.numel() for p in module.parameters())
    assert float(values["trainable_parameters"]) == pytest.approx(float(values["trainable_fraction"]) * total)
    assert 0.3 < float(values["trainable_fraction"]) < 0.5


def test_picture(tmp_path):
    module = causal(tiny_llama(layers=4))
    callback = HalfFineTuning(reselect="epoch", picture=True)
    fit(module, callback, max_steps=-1, max_epochs=3, default_root_dir=tmp_path)
    (png,) = tmp_path.rglob("*.png")
    assert png.read_bytes()[:4] == b"\x89PNG"
    shares = {w.name: callback.share(w) for w in weights_by_role(module) if w.block is not None and not w.is_bias}
    assert set(shares.values()) <= {0.0, 1 / 3, 2 / 3, 1.0}
    assert sum(shares.values()) == pytest.approx(len(shares) / 2)  # exact halves, round by round


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0}, r"fraction=0 must lie in \(0, 1\)"),
        ({"fraction": 1.0}, r"fraction=1\.0 must lie in"),
        ({"granularity": "block"}, r"granularity='block' is not known.*category"),
        ({"reselect": "step"}, r"reselect='step' is not known.*epoch"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HalfFineTuning(**arguments)


def test_refuses_too_few_matrices_and_names_the_block():
    module = causal(tiny_llama(layers=3))
    module.model.model.layers[1].mlp = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"'model\.model\.layers\.1' has no matrix of .* 'ffn'.*granularity"):
        fit(module, HalfFineTuning())
    fit(module, HalfFineTuning(granularity="layer"))
