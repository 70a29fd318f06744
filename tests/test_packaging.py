"""What is installed: the folders in a wheel, imports from every kind of install, and what an import costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "lightning_peft", "callbacks", "datamodules")
WHERE = (
    "import lightning_peft, lightning_peft.callbacks, lightning_peft.datamodules, lightning_peft.registry;"
    "print(lightning_peft.__file__, lightning_peft.callbacks.__file__, lightning_peft.datamodules.__file__)"
)


def python(code: str, cwd: Path, **env: str) -> str:
    """What `python -c code` prints in a process of its own."""
    environment = {**os.environ, **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy_of_checkout(target: Path) -> Path:
    target.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_checkout(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"lightning_peft/{p.relative_to(ROOT / 'lightning_peft')}" for p in (ROOT / "lightning_peft").rglob("*.py")
    }
    for folder in ("callbacks", "datamodules"):
        sources |= {f"lightning_peft/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == sources
    assert "lightning_peft/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("lightning_peft/", "lightning_peft-")) for name in names)
    metadata = next(name for name in names if name.endswith("entry_points.txt"))
    assert "lightning-peft = lightning_peft.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_imports_from_a_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    paths = python(WHERE, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    site = tmp_path / "site" / "lightning_peft"
    assert [Path(p).parent for p in paths] == [site, site / "callbacks", site / "datamodules"]


def test_imports_from_the_root_of_a_checkout(tmp_path):
    root = copy_of_checkout(tmp_path / "checkout")
    paths = python(WHERE, root).split()
    assert [Path(p).parent for p in paths] == [root / "lightning_peft", root / "callbacks", root / "datamodules"]


def test_imports_from_an_editable_install(tmp_path):
    paths = python(WHERE, tmp_path).split()
    assert [Path(p).parent for p in paths] == [ROOT / "lightning_peft", ROOT / "callbacks", ROOT / "datamodules"]


def test_importing_the_package_loads_the_standard_library_only(tmp_path):
    code = (
        "import sys, time; before = set(sys.modules); t = time.perf_counter(); import lightning_peft;"
        "import lightning_peft.registry, lightning_peft.cli; t = time.perf_counter() - t;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'lightning_peft'};"
        "import json; print(json.dumps([sorted(new - set(sys.stdlib_module_names)), t]))"
    )
    foreign, seconds = json.loads(python(code, tmp_path))
    print(f"import lightning_peft, its registry and command line: {seconds:.3f} s")
    assert not [name for name in foreign if not name.startswith("__editable__")]


COST = """
import importlib, json, sys
import lightning.pytorch, peft
costs = {}
for package in ("models", "objectives", "callbacks", "datamodules"):
    module = importlib.import_module(f"lightning_peft.{package}")
    for name in module.__all__:
        before = set(sys.modules)
        getattr(module, name)
        new = sorted(m for m in set(sys.modules) - before if not m.startswith("lightning_peft"))
        costs[f"{package}.{name}"] = new
print(json.dumps(costs))
"""


def test_a_component_adds_little_to_importing_lightning_and_peft(tmp_path):
    costs = json.loads(python(COST, tmp_path).splitlines()[-1])
    dear = {name: len(new) for name, new in costs.items() if len(new) > 60}
    assert not dear, f"modules loaded beside lightning.pytorch and peft: {dear}"
    heavy = {m.split(".")[0] for new in costs.values() for m in new} & {"datasets", "matplotlib", "scipy", "mergekit"}
    assert not heavy, f"{heavy} belong inside the functions that need them"


WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    "The path finder, blind to packages that are not on every platform."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("bitsandbytes", "triton"):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for package in ("models", "objectives", "callbacks", "datamodules", "kernels", "merging", "adapters"):
    module = importlib.import_module(f"lightning_peft.{package}")
    for name in getattr(module, "__all__", []):
        getattr(module, name)
assert not {"bitsandbytes", "triton"} & set(sys.modules)

import torch
from lightning_peft.kernels import linear_cross_entropy
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
nll = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3, -100]))
nll.sum().backward()
expected = torch.nn.functional.cross_entropy((hidden @ weight.T)[:4], torch.arange(4), reduction="none")
torch.testing.assert_close(nll[:4], expected)
print("ok")
"""


def test_everything_imports_without_bitsandbytes_and_triton(tmp_path):
    assert python(WITHOUT, tmp_path).splitlines()[-1] == "ok"
