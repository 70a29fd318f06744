"""The registry as test parameters: a column's test runs for every component that the column applies to."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_peft.registry import WAYS_OF_USE, Component, components

#: Kinds that must bring an example; other kinds take part if they have one.
TESTED = ("mixin", "callback", "datamodule")


def full() -> bool:
    """Whether the full product was asked for (`make conformance`), rather than one pass of each column."""
    return os.environ.get("CONFORMANCE") == "full"


def techniques(*columns: str, kinds: tuple[str, ...] = (*TESTED, "module", "layer")) -> Any:
    """Parametrizes `technique` over the components with an example; exceptions are skipped with their reason."""
    parameters = []
    for _, component in components():
        if component.example is None or component.kind not in kinds:
            continue
        reason = why_not(component, *columns)
        marks = [pytest.mark.skip(reason=f"does not apply: {reason}")] if reason else []
        parameters.append(pytest.param(component, id=component.name, marks=marks))
    return pytest.mark.parametrize("technique", parameters)


def why_not(component: Component, *columns: str) -> str | None:
    """The registry's reason why one of the columns does not apply to the component."""
    return next((component.not_applicable[c] for c in columns if c in component.not_applicable), None)


def skip_unless_applicable(component: Component, *columns: str) -> None:
    """Skips the running test where the registry says that one of the columns does not apply."""
    reason = why_not(component, *columns)
    if reason:
        pytest.skip(f"does not apply: {reason}")


def with_way(way: str) -> tuple[str, ...]:
    """Kinds that are used in this way."""
    return tuple(kind for kind, ways in WAYS_OF_USE.items() if way in ways)


def variants(name: str, first: Any, *others: Any) -> Any:
    """Parametrizes over `first`, and over the others in the full product."""
    return pytest.mark.parametrize(name, [first, *others] if full() else [first])
