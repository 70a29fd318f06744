"""A callback's term in the loss: on our modules and on any other, alone and with accumulation, ranks and precision."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.loss_terms import LossTerm, add_loss_terms, remove_loss_terms
from lightning_peft.models import SequenceClassifier
from lightning_peft.objectives import Objective
from tests.adapted import QUIET, Classifier, Foreign, Rows, fit, loader
from tests.processes import run_on_two
from tests.tiny import tiny_bert


def squares(module, coefficient: float) -> torch.Tensor:
    """coefficient * sum of squares of the attention matrices: a gradient in most of the network."""
    return coefficient * sum(p.float().square().sum() for n, p in module.named_parameters() if "q_proj" in n)


class Shrink(L.Callback):
    """What a technique's callback does, in short."""

    def __init__(self, coefficient: float = 0.05, name: str = "shrink") -> None:
        self.term = LossTerm([name], lambda module: {name: squares(module, coefficient)})

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            add_loss_terms(pl_module, self.term, "Shrink")

    def teardown(self, trainer, pl_module, stage):
        remove_loss_terms(pl_module, self.term)


class ByHand(Foreign):
    """The same term, written into the module's own step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + squares(self, 0.05)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_any_module_it_is_the_term_written_into_the_step(accumulate, precision):
    sgd = {"optimizer": "SGD", "lr": 0.1}
    ours, theirs, without = Foreign(**sgd), ByHand(**sgd), Foreign(**sgd)
    # 4 micro-batches of 4: with accumulation 3 the last step has one.
    for module, callbacks in ((ours, [Shrink()]), (theirs, []), (without, [])):
        fit(module, callbacks, steps=4, accumulate_grad_batches=accumulate, precision=precision)
    assert_close(weights(ours), weights(theirs))
    name = "net.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights(ours)[name], weights(without)[name])


def classifier_rows(n: int) -> list[dict[str, torch.Tensor]]:
    rows = Rows(n)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": c} for i, c in zip(rows.ids, rows.classes)]


def query_squares(module) -> torch.Tensor:
    return 0.05 * sum(p.square().sum() for n, p in module.named_parameters() if "query.weight" in n)


def classifier_step(given: dict[str, torch.Tensor], rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One SGD step by hand on the mean over all rows plus the term."""
    module = SequenceClassifier(tiny_bert())
    module.load_state_dict(given)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    loss = module.model(**batch).loss + query_squares(module)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return {n: (p - 0.1 * g).detach() for (n, p), g in zip(module.named_parameters(), gradients)}


@pytest.mark.parametrize(
    ("accumulate", "make"),
    [(1, LookAheadDataLoader), (3, LookAheadDataLoader), (4, LookAheadDataLoader), (3, DataLoader)],
)
def test_on_our_modules_it_counts_once_an_optimizer_step(accumulate, make):
    """Also in a last window that is shorter than the others (4), and with a loader that does not look ahead."""
    rows = classifier_rows(12)
    module = SequenceClassifier(tiny_bert(), optimizer="sgd", learning_rate=0.1, lr_scheduler="constant")
    expected = classifier_step(module.state_dict(), rows)
    term = LossTerm(["shrink"], lambda m: {"shrink": query_squares(m)})

    class Add(L.Callback):
        def setup(self, trainer, pl_module, stage):
            add_loss_terms(pl_module, term, "Add")

    trainer = L.Trainer(
        **QUIET, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[Add()], enable_checkpointing=False
    )
    size = {1: 12, 3: 4, 4: 4}[accumulate]
    trainer.fit(module, make(rows, batch_size=size), DataLoader(rows, batch_size=6))
    assert_close(weights(module), expected, 1e-6)
    logged = trainer.callback_metrics
    assert "train_shrink" in logged
    assert "val_shrink" not in logged, "the term costs nothing in validation"


def on_two(rank: int) -> dict[str, torch.Tensor]:
    from lightning.pytorch.strategies import DDPStrategy

    module = Foreign(optimizer="SGD", lr=0.1)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = L.Trainer(
        **QUIET, max_steps=3, devices=2, strategy=strategy, callbacks=[Shrink()], enable_checkpointing=False
    )
    trainer.fit(module, loader(4, 2))  # the whole of the data in each step, however Lightning deals it
    return weights(module)


def test_on_two_ranks_it_is_the_one_process():
    first, second = run_on_two(on_two)
    assert_close(first, second)
    module = ByHand(optimizer="SGD", lr=0.1)
    trainer = L.Trainer(**QUIET, max_steps=3, enable_checkpointing=False)
    trainer.fit(module, loader(4, 4))
    assert_close(first, weights(module), 1e-6)


def test_dictionaries_and_skipped_steps():
    class Returns(Foreign):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            return {"loss": super().training_step(batch, batch_idx), "note": batch_idx}

    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((batch_idx, outputs and outputs["note"], outputs and float(outputs["loss"])))

    module = Returns(lr=0.0)
    fit(module, [Shrink(1.0), See()], steps=3, max_epochs=1)
    plain = float(module.loss(next(iter(loader()))))
    assert seen[0] == (0, 0, pytest.approx(plain + float(squares(module, 1.0)), abs=1e-5))
    assert not seen[1][1:][0]


def test_each_term_is_logged_under_its_own_name():
    module = Foreign(lr=0.0)
    trainer = fit(module, [Shrink(0.05), Shrink(0.2, "more")], steps=1)
    for name, coefficient in (("train_shrink", 0.05), ("train_more", 0.2)):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(squares(module, coefficient)), rel=1e-5)


def test_two_terms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two callbacks add a term named 'shrink'"):
        fit(Foreign(), [Shrink(), Shrink(0.2)], steps=1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_callbacks_unwrap_in_any_order(order):
    module = Foreign()
    terms = [LossTerm([name], lambda m: {}) for name in "ab"]
    for term in terms:
        add_loss_terms(module, term, "Test")
        add_loss_terms(module, term, "Test")
    assert module.training_step.loss_terms == terms
    remove_loss_terms(module, terms[order[0]])
    assert module.training_step.loss_terms == [terms[order[1]]]
    remove_loss_terms(module, terms[order[1]])
    assert "training_step" not in module.__dict__
    remove_loss_terms(module, terms[0])


def test_what_stood_there_stands_there_again():
    module, calls = Foreign(), []
    own = module.training_step

    def mine(batch, batch_idx):
        calls.append(batch_idx)
        return own(batch, batch_idx)

    module.training_step = mine
    fit(module, [Shrink()], steps=2)
    assert calls == [0, 1]
    assert module.__dict__["training_step"] is mine


def test_somebody_elses_wrapper_on_top_of_ours_goes_on():
    module, term = Foreign(), LossTerm(["shrink"], lambda m: {"shrink": squares(m, 1.0)})
    add_loss_terms(module, term, "Test")
    ours, calls = module.training_step, []

    def theirs(batch, batch_idx):
        calls.append(batch_idx)
        return ours(batch, batch_idx)

    theirs.__wrapped__ = ours
    module.training_step = theirs
    remove_loss_terms(module, term)
    batch = next(iter(loader()))
    module.log = lambda *args, **kwargs: None
    assert float(module.training_step(batch, 0)) == pytest.approx(float(module.loss(batch)))
    assert module.__dict__["training_step"] is theirs
    assert calls == [0]


def test_stages_change_nothing():
    module, callback = Foreign(lr=0.0), Shrink(1.0)
    trainer = L.Trainer(**QUIET, max_steps=2, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, loader())
    assert "training_step" not in module.__dict__
    plain = float(module.loss(next(iter(loader()))))
    for run in (trainer.validate, trainer.test):
        (values,) = run(module, DataLoader(Rows(4), batch_size=4), verbose=False)
        assert next(iter(values.values())) == pytest.approx(plain, abs=1e-5)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, loader())
    assert "training_step" not in module.__dict__


def test_a_copy_of_the_module_copies_no_callback():
    module = Foreign()
    callback = Shrink()
    add_loss_terms(module, callback.term, "Shrink")
    assert copy.deepcopy(module).training_step.loss_terms[0] is callback.term


def test_manual_optimisation_is_refused_by_name():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"Shrink adds terms to the loss, and Manual uses manual optimization"):
        fit(Manual(), [Shrink()], steps=1)


def test_what_changes_the_step_itself_needs_our_modules():
    class Weighted(Objective):
        def loss_weights(self, module, batch, units):
            return units.nll

    with pytest.raises(
        ValueError, match=r"Half changes the step itself \(loss_weights\), which Foreign does not offer"
    ):
        add_loss_terms(Foreign(), Weighted(), "Half")
