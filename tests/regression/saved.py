"""Writes and reads the saved checkpoints: one small file a technique, made once and never silently anew.

    .venv/bin/python -m tests.regression.saved [NAME ...]

makes those that are missing, or the named ones anew: do that only for a change of format that users are told of
(CHANGELOG.md), and never on a tree with changes of its own, for then nobody could say which code wrote the file.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_peft.registry import Component, components
from tests.conformance.runs import Run, result
from tests.conformance.table import TESTED, why_not

FOLDER = Path(__file__).parent / "files"
KEY = "losses after it"  # beside what Lightning keeps in a checkpoint
STEP = 3  # of six: an epoch's end, after which techniques choose anew


def path_of(component: Component) -> Path:
    return FOLDER / f"{component.name}.ckpt.xz"


def wanted() -> list[Component]:
    """Every component that the conformance suite resumes, once by name."""
    kinds = (*TESTED, "module", "layer")
    rows = [row for _, row in components() if row.example is not None and row.kind in kinds]
    return list({row.name: row for row in rows if not why_not(row, "resume")}.values())


def unpacked(component: Component, folder: Path) -> Path:
    """The checkpoint as Lightning reads it."""
    made = folder / f"{component.name}.ckpt"
    made.write_bytes(lzma.decompress(path_of(component).read_bytes()))
    return made


def go_on(component: Component, checkpoint: Path, folder: Path) -> list[float]:
    """Losses of the steps after the checkpoint, by today's code."""
    return result(Run(component.path, dropout=0.1, folder=str(folder), save=True, resume=str(checkpoint))).losses


def make(component: Component, folder: Path) -> None:
    """Trains to the middle and keeps the checkpoint, with what the steps after it cost."""
    result(Run(component.path, dropout=0.1, folder=str(folder), save=True))
    source = folder / f"step={STEP}.ckpt"
    content: dict[str, Any] = torch.load(source, weights_only=True)
    # Values of few digits: most of their bits are zeros, and the packed file is a quarter as large.
    for name, value in content["state_dict"].items():
        if value.is_floating_point():
            content["state_dict"][name] = value.to(torch.float8_e5m2).to(value.dtype)
    torch.save(content, source)
    content[KEY] = go_on(component, source, folder)
    torch.save(content, source)
    FOLDER.mkdir(exist_ok=True)
    path_of(component).write_bytes(lzma.compress(source.read_bytes(), preset=9))


def main(names: list[str]) -> None:
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    others = [line for line in changed.splitlines() if "tests/regression/" not in line]
    if others:
        raise SystemExit(f"the tree has changes of its own, first {others[0]!r}: commit them, then make the files.")
    known = {component.name: component for component in wanted()}
    if unknown := set(names) - known.keys():
        raise SystemExit(f"{sorted(unknown)} are not among {sorted(known)}.")
    for name in names or [name for name, component in known.items() if not path_of(component).exists()]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CONFORMANCE_TMP"] = os.environ["LIGHTNING_PEFT_CACHE"] = folder
            make(known[name], Path(folder))
        print(f"{name}: {path_of(known[name]).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
