"""Every two registered mixins in one class: weights multiply, terms add, in either order; or they refuse each other.

Read from the registry, so that a new mixin takes part by being registered. One that cannot be stacked says why under
`not_applicable={"composition": ...}`; two that exclude each other raise, naming both.
"""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import default_collate

from lightning_peft.callbacks import PEFT
from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.objectives import ConceptAwareFineTuningMixin
from lightning_peft.registry import Component, components
from tests.conformance.compare import assert_same, moved
from tests.conformance.data import Rows
from tests.conformance.recorder import weights_of
from tests.conformance.runs import Run, _class_path, load, network_of
from tests.models.test_causal_lm import counts_of, gradients, quiet_trainer
from tests.tiny import VOCABULARY, tiny_tokenizer

MIXINS = [component for _, component in components() if component.kind == "mixin" and component.example is not None]
#: What the module itself sums of the main loss.
MAIN = ("loss", "nll", "weight")
#: What an example leaves to a run: outside of one, the number of steps is not known.
OUTSIDE = {"ConceptAwareFineTuningMixin": {"heads_schedule": "constant"}}


def module_class(component: Component) -> type:
    return load(_class_path(component.example.module))


def why_apart(first: Component, second: Component) -> str | None:
    for component in (first, second):
        if "composition" in component.not_applicable:
            return component.not_applicable["composition"]
    if module_class(first) is not module_class(second):
        return "they train networks of different kinds"
    return None


def pairs(by_hand: bool = False) -> Any:
    made = []
    for first, second in itertools.combinations(MIXINS, 2):
        reason = why_apart(first, second)
        if by_hand and reason is None and not issubclass(module_class(first), CausalLM):
            reason = "it is shown by a run of both"
        if by_hand and reason is None and "AuxiliaryHeadPretrainingMixin" in (first.name, second.name):
            reason = "the network's own loss is left out, so there is no sum: it is shown by a run of both"
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        made.append(pytest.param(first, second, id=f"{first.name}+{second.name}", marks=marks))
    return pytest.mark.parametrize(("first", "second"), made)


def build(*stacked: Component | type, outside: bool = False, **further: Any) -> Any:
    """The mixins, in this order, on their module, each with the arguments of its example."""
    registered = [one for one in stacked if isinstance(one, Component)]
    arguments: dict[str, Any] = dict(further)
    for one in registered:
        arguments |= {
            **one.example.module_arguments,
            **one.example.arguments,
            **(OUTSIDE.get(one.name, {}) if outside else {}),
        }
    bases = [one.load() if isinstance(one, Component) else one for one in stacked]
    network = network_of(Run(registered[0].path))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = type("Stacked", (*bases, module_class(registered[0])), {})(
            network, tokenizer=tiny_tokenizer(), **{"optimizer": "sgd", "learning_rate": 0.1, **arguments}
        )
        torch.manual_seed(5)  # away from where it started, for terms that hold it there
        for parameter in module.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def refusal(*stacked: Component) -> str | None:
    """Why the mixins cannot stand in one class; `None` if they can."""
    try:
        build(*stacked)
    except ValueError as error:
        return str(error)
    return None


#: Kinds of rows that are the base of a batch, the first of them that is asked for; the others add columns to it.
BASES = ("image_pairs", "images", "traces", "tokens")


class Both(Rows):
    """Rows with the columns that two mixins want."""

    def __init__(self, first: Component, second: Component, **kwargs: Any) -> None:
        kinds = [first.example.data, second.example.data]
        super().__init__(next((kind for kind in BASES if kind in kinds), "tokens"), **kwargs)
        joined = self.collate_fn or default_collate
        self.collate_fn = lambda rows: with_columns(joined(rows), kinds)


def with_columns(batch: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """The batch with what the kinds "faults" and "reasoning" have besides tokens, made from the tokens."""
    ids, learnt = batch.get("input_ids"), batch["labels"] != -100
    if "faults" in kinds:
        mask = learnt & (ids % 3 == 1)
        wrong = {"wrong_input_ids": torch.where(mask, (ids + 7) % VOCABULARY, ids), "wrong_fault_mask": mask.long()}
        batch = {**batch, **wrong, "fault_mask": mask.long(), "wrong_attention_mask": batch["attention_mask"]}
    if "reasoning" in kinds:
        batch = {**batch, "reasoning_mask": (ids % 3 == 0).long()}
    return batch


def batch_of_both(first: Component, second: Component) -> dict[str, Any]:
    return next(iter(Both(first, second).train_dataloader()))


def evaluate(module: Any, batch: dict[str, Any]) -> Any:
    """The step's terms on a batch, their gradients, and the loss that the weights do not explain."""
    batch = module.transform_batch(dict(batch))
    counts = counts_of(module, batch)
    terms = module.terms(batch, counts)
    terms.loss.backward()
    weights = torch.ones_like(terms.units.nll) if terms.weights is None else terms.weights
    further = terms.loss.detach() - (weights * terms.units.nll).sum() / counts["loss"]
    return terms, gradients(module), weights, further, counts


def as_read(batch: dict[str, Any], without: Component, of: tuple[Component, ...]) -> dict[str, Any]:
    """The batch as the others leave it that change what the network reads."""
    for component in of:
        module = build(component, outside=True)
        if component is not without and any(objective.changes_inputs for objective in module.objectives):
            batch = module.before_forward(module.transform_batch(dict(batch)))
    return batch


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_there_are_pairs_to_test():
    runnable = [pair for pair in itertools.combinations(MIXINS, 2) if why_apart(*pair) is None]
    assert len(runnable) >= 15


@pairs()
def test_two_fit_together_or_both_orders_say_why_not(first, second):
    one, other = refusal(first, second), refusal(second, first)
    assert (one is None) == (other is None), f"only one order is refused: {one or other}"
    if one is not None:
        names = [component.name.removesuffix("Mixin") for component in (first, second)]
        assert all(name in one and name in other for name in names), f"the refusal does not name both: {one}"


@pairs(by_hand=True)
def test_weights_multiply_and_terms_add_in_either_order(first, second):
    if reason := refusal(first, second):
        pytest.skip(f"refused: {reason}")
    batch = batch_of_both(first, second)
    terms, gradient, weights, further, counts = evaluate(build(first, second, outside=True), batch)
    other, other_gradient, other_weights, *_ = evaluate(build(second, first, outside=True), batch)
    torch.testing.assert_close(other.loss, terms.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other_weights, weights, rtol=1e-6, atol=1e-7)
    same(gradient, other_gradient)
    alone = [
        evaluate(build(component, outside=True), as_read(batch, without=component, of=(first, second)))
        for component in (first, second)
    ]
    torch.testing.assert_close(weights, alone[0][2] * alone[1][2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(further, alone[0][3] + alone[1][3], rtol=1e-4, atol=1e-5)
    assert counts == {**alone[0][4], **alone[1][4]}
    own = {name: total for one in alone for name, total in one[0].sums.items() if name not in MAIN}
    same(own, {name: total for name, total in terms.sums.items() if name not in MAIN})


@pairs(by_hand=True)
def test_two_beside_concept_aware_fine_tuning(first, second):
    """The auxiliary heads' rows are in the same call of the kernel and must not be taken for the network's own."""
    if reason := refusal(first, second):
        pytest.skip(f"refused: {reason}")
    if ConceptAwareFineTuningMixin in (first.load(), second.load()):
        pytest.skip("one of them is it")
    caft = next(one for one in MIXINS if one.load() is ConceptAwareFineTuningMixin)
    batch = batch_of_both(first, second)
    _, gradient, weights, further, _ = evaluate(build(first, second, caft, outside=True), batch)
    _, other_gradient, *_ = evaluate(build(caft, second, first, outside=True), batch)
    same(gradient, other_gradient)
    *_, plain_weights, plain_further, _ = evaluate(build(first, second, outside=True), batch)
    *_, heads, _ = evaluate(build(caft, outside=True), as_read(batch, without=caft, of=(first, second)))
    torch.testing.assert_close(weights, plain_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(further, plain_further + heads, rtol=1e-4, atol=1e-5)


def fitted(tmp_path: Any, stacked: tuple[Component, ...], callbacks: list[L.Callback]) -> tuple[Any, dict, dict]:
    L.seed_everything(0, verbose=False)
    module = build(*stacked)
    before = weights_of(module)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=1, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, Both(*sorted(stacked, key=lambda one: one.path)))
    assert trainer.global_step == 3
    return module, before, weights_of(module)


@pairs()
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_two_train_alike_in_either_order(first, second, lora, tmp_path):
    if reason := refusal(first, second):
        pytest.skip(f"refused: {reason}")

    def callbacks() -> list[L.Callback]:
        if not lora:
            return []
        return [PEFT({"peft_type": "LORA", "r": 2, "target_modules": "all-linear"})]

    _, before, after = fitted(tmp_path, (first, second), callbacks())
    _, _, other = fitted(tmp_path, (second, first), callbacks())
    assert_same(other, after, 1e-6, "the other order")
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    if lora:
        assert any("lora_B" in name and value.abs().sum() > 0 for name, value in after.items())
        changed = moved(before, {name.replace(".base_layer", ""): value for name, value in after.items()})
        assert not {name for name in changed if name.startswith("model.")}
    else:
        assert moved(before, after)
