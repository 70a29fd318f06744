"""The registry: 119 papers, every path importable, every public class documented, no argument name used twice."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from pathlib import Path

import docstring_parser
import lightning.pytorch as L
import pytest
from peft import PeftConfig
from torch import nn

from lightning_peft import registry
from lightning_peft.registry import COLUMNS, KINDS, SHARED, TECHNIQUES, components, technique

PACKAGES = ("models", "objectives", "callbacks", "datamodules")
COMPONENTS = [component for _, component in components()]
ROOT = Path(__file__).resolve().parent.parent


def public_names():
    """Every lazily resolved public name, with what it names."""
    for package in PACKAGES:
        module = importlib.import_module(f"lightning_peft.{package}")
        for name in module.__all__:
            yield f"{package}.{name}", getattr(module, name)


def own_arguments(function) -> list[str]:
    """The arguments that a constructor (or function) names itself."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in variable and p.name != "self"]


def test_all_119_papers_stand_in_order_with_their_titles():
    assert [row.paper for row in TECHNIQUES] == list(range(1, 120))
    titles = "\n".join(row.title for row in TECHNIQUES)
    # Of the numbered titles in the list of papers this suite implements.
    assert (
        hashlib.sha256(titles.encode()).hexdigest()
        == "3793aa3b5f1accb29d95f97f284fa043061611978944dfffd4b63159e5a34327"
    )


def test_a_row_is_built_or_says_that_it_is_not():
    for row in TECHNIQUES:
        assert (row.works == "not built yet") == (not row.components), row.paper
        assert set(row.row()) == {"paper", "title", "component", "kind", "path", "works"}
    assert technique(58).title.startswith("HFT")
    with pytest.raises(KeyError, match="1 to 119"):
        technique(120)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: c.path)
def test_component_is_what_its_row_says(component):
    loaded = component.load()
    assert component.kind in KINDS
    assert loaded.__name__ == component.name
    if component.kind == "function":
        assert inspect.isfunction(loaded)
        return
    assert inspect.isclass(loaded)
    bases = {
        "callback": L.Callback,
        "datamodule": L.LightningDataModule,
        "module": L.LightningModule,
        "layer": (nn.Module, PeftConfig),  # a tuner is used through its config
        "metric": nn.Module,
    }
    if component.kind in bases:
        assert issubclass(loaded, bases[component.kind])
    if component.kind == "mixin":
        assert not issubclass(loaded, L.LightningModule)
        assert component.ready, "a mixin comes with one ready LightningModule for YAML"
        module, _, name = component.ready.rpartition(".")
        ready = getattr(importlib.import_module(module), name)
        assert issubclass(ready, loaded)
        assert issubclass(ready, L.LightningModule)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: c.path)
def test_examples_and_exceptions_are_plain_data(component):
    assert set(component.not_applicable) <= set(COLUMNS)
    assert all(reason.strip() for reason in component.not_applicable.values())
    if component.example is not None:
        arguments = dict(component.example.arguments)
        assert json.loads(json.dumps(arguments)) == arguments


def test_every_public_class_is_registered():
    registered = {component.load() for component in COMPONENTS}
    ready = {component.ready for component in COMPONENTS if component.ready}
    for name, loaded in public_names():
        kinds = (L.Callback, L.LightningDataModule, L.LightningModule)
        if not (inspect.isclass(loaded) and (issubclass(loaded, kinds) or name.endswith("Mixin"))):
            continue
        abstract = any(getattr(value, "__isabstractmethod__", False) for value in vars(loaded).values())
        if abstract or f"{loaded.__module__}.{loaded.__name__}" in ready:
            continue
        assert loaded in registered, f"{name} is public and has no row in the registry"


def test_registered_callbacks_data_modules_and_mixins_are_public():
    public = {loaded for _, loaded in public_names() if inspect.isclass(loaded)}
    for component in COMPONENTS:
        if component.kind in ("callback", "datamodule", "mixin", "module"):
            assert component.load() in public, f"{component.path} is missing in its package's table of names"


def test_every_argument_of_every_public_class_and_registered_function_is_documented():
    missing = []
    loaded = dict(public_names()) | {component.path: component.load() for component in COMPONENTS}
    for name, value in loaded.items():
        if not (inspect.isclass(value) or (inspect.isfunction(value) and name.startswith("lightning_peft."))):
            continue
        if not value.__doc__:
            missing.append(f"{name}: no docstring")
            continue
        own = inspect.isfunction(value) or "__init__" in vars(value)
        inherited = own_arguments(PeftConfig) if inspect.isclass(value) and issubclass(value, PeftConfig) else []
        documented = {p.arg_name.lstrip("*") for p in docstring_parser.parse(value.__doc__).params}
        known = {*documented, *inherited}
        missing += [f"{name}: {arg}" for arg in (own_arguments(value) if own else []) if arg not in known]
    assert not missing, "\n".join(missing)


def test_no_two_papers_mixins_share_an_argument_name():
    # Stacked in one class, one of two equal names would silently keep its default (FINDINGS, 12).
    from lightning_peft.models import CausalLM, FineTuningModule, SequenceClassifier, TextEncoder

    owners: dict[str, object] = {}
    for module in (FineTuningModule, CausalLM, SequenceClassifier, TextEncoder):
        owners.update(dict.fromkeys(own_arguments(module.__init__), "the module"))
    for paper, component in components():
        if component.kind != "mixin":
            continue
        for argument in own_arguments(component.load().__init__):
            owner = owners.setdefault(argument, paper)
            assert owner == paper, f"{component.name}({argument}=...) is also an argument of {owner}"


def test_every_module_of_the_package_imports():
    folders = {"lightning_peft": "lightning_peft", "callbacks": "lightning_peft.callbacks"}
    for folder, package in (folders | {"datamodules": "lightning_peft.datamodules"}).items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            importlib.import_module(".".join([package, *parts]))


def test_nothing_shared_is_also_a_paper():
    papers = {component.path for row in TECHNIQUES for component in row.components}
    assert not papers & {component.path for component in SHARED}
    assert registry.WAYS_OF_USE.keys() <= set(KINDS)
