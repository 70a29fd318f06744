"""Every registered mixin divides by the step's own counts: in packed rows, and where a micro-batch or rank has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.packing import packed_row
from lightning_peft.datamodules.trace_set import TraceSetCollator
from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.registry import Component
from tests.conformance.compare import assert_same
from tests.conformance.data import make_row
from tests.models.test_causal_lm import counts_of, quiet_trainer
from tests.objectives.test_composition import MIXINS, build, module_class
from tests.processes import run_on_two

WRONG = "wrong_"


def mixins(column: str) -> Any:
    made = []
    for component in MIXINS:
        # Rows or a step of a kind of their own: so are the tests of their counts.
        reason = component.not_applicable.get(column) or component.not_applicable.get("composition")
        if not issubclass(module_class(component), CausalLM):
            reason = "its units are no tokens; the conformance suite has its counts"
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        made.append(pytest.param(component, id=component.name, marks=marks))
    return pytest.mark.parametrize("component", made)


def rows_of(component: Component, n: int = 12, empty: Any = ()) -> list[dict[str, Any]]:
    """Rows of the mixin's kind, some of them without one label."""
    generator = torch.Generator().manual_seed(0)
    rows = [make_row(component.example.data, generator, number) for number in range(n)]
    for number in empty:
        for row in rows[number].get("traces", [rows[number]]):
            for name in {"labels", "fault_mask", "wrong_fault_mask", "reasoning_mask"} & row.keys():
                row[name] = torch.full_like(row[name], -100 if name == "labels" else 0)
    return rows


def trained(component: Component, rows: list, folder: Any, batch_size: int, **trainer: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = build(component, lr_scheduler="constant")
    joined = TraceSetCollator() if "traces" in rows[0] else None
    loader = LookAheadDataLoader(rows, batch_size=batch_size, shuffle=False, collate_fn=joined)
    quiet_trainer(folder, max_epochs=2, **trainer).fit(module, loader)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@mixins("accumulation")
def test_a_micro_batch_without_a_label(component, tmp_path):
    rows = rows_of(component, empty=range(4, 8))
    large = trained(component, rows, tmp_path, 12)
    small = trained(component, rows, tmp_path, 4, accumulate_grad_batches=3)
    assert_same(small, large, 1e-6, "three micro-batches, the second without a label, against one batch")


def on_a_rank(rank: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """All mixins one after the other: a pair of processes takes seconds to start."""
    from lightning.pytorch.strategies import DDPStrategy

    made = {}
    for component in applicable():
        rows = rows_of(component, empty=range(1, 12, 2))  # what rank 1 sees
        strategy = DDPStrategy(process_group_backend="gloo")
        made[component.name] = trained(
            component, rows, folder, 3, accumulate_grad_batches=2, strategy=strategy, devices=2
        )
    return made


def applicable() -> list[Component]:
    tokens = [one for one in MIXINS if issubclass(module_class(one), CausalLM)]
    return [one for one in tokens if not {"ddp", "accumulation", "composition"} & one.not_applicable.keys()]


def test_a_rank_without_a_label(tmp_path):
    first, second = run_on_two(on_a_rank, str(tmp_path))
    for component in applicable():
        one = trained(component, rows_of(component, empty=range(1, 12, 2)), tmp_path, 12)
        assert_same(second[component.name], first[component.name], 0.0, f"{component.name}: rank 1 against rank 0")
        assert_same(first[component.name], one, 1e-6, f"{component.name}: two ranks, one without a label, against one")


def documents_of(rows: list[dict[str, Any]]) -> tuple[list[dict], list[dict], list[str]]:
    """Rows without their padding: what stands by itself, what begins with "wrong_", and the token columns."""
    own, wrong = [], []
    for row in rows:
        kept = row["attention_mask"].bool()
        values = {name: value[kept].numpy() for name, value in row.items() if not name.endswith("attention_mask")}
        own.append({name: value for name, value in values.items() if not name.startswith(WRONG)})
        wrong.append({name.removeprefix(WRONG): v for name, v in values.items() if name.startswith(WRONG)})
    columns = [name for name in own[0] if name not in ("input_ids", "labels")]
    return own, wrong, columns


def joined(documents: list[list[dict]], columns: list[str], packed: bool) -> dict[str, Any]:
    """A batch, a list of documents a row."""
    if packed:
        rows = [packed_row(part, [name for name in columns if name in part[0]]) for part in documents]
    else:
        rows = [one for part in documents for one in part]
    return collate(rows, pad_token_id=0, token_columns=columns)


@mixins("accumulation")
def test_packed_documents_equal_those_in_rows_of_their_own(component):
    if component.example.data not in ("tokens", "faults", "reasoning"):
        pytest.skip("its rows are more than documents: its data module does not pack")
    own, wrong, columns = documents_of(rows_of(component, 9, empty=[4]))
    found = []
    for packed in (False, True):
        parts = [slice(0, 4), slice(4, 7), slice(7, 9)]
        batch = joined([own[part] for part in parts], columns, packed)
        if wrong[0]:
            second = joined([wrong[part] for part in parts], columns, packed)
            batch |= {WRONG + name: value for name, value in second.items()}
        if not packed:
            batch["labels"][:, 0] = -100  # packing does not learn a document's first token
        module = build(component, outside=True)
        batch = module.transform_batch(batch)
        counts = counts_of(module, batch)
        terms = module.terms(batch, counts)
        terms.loss.backward()
        found.append(
            (counts, terms.loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        )
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
    assert_same(found[1][2], found[0][2], 1e-5, "gradients of packed rows against rows apart")


def test_a_weight_of_packed_documents_is_that_of_their_tokens():
    """`weight` is [batch] in plain rows and [batch, time] in packed ones."""
    (component,) = [one for one in MIXINS if one.name == "DynamicFineTuningMixin"]
    own, _, _ = documents_of(rows_of(component, 4))
    own = [{**one, "weight": 0.5 + i} for i, one in enumerate(own)]
    found = []
    for packed in (False, True):
        batch = joined([own[:3], own[3:]], [], packed)
        if not packed:
            batch["labels"][:, 0] = -100
        module = build(component)
        found.append(module.terms(batch, counts_of(module, batch)).loss)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
