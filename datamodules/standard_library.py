"""The documented functions of the running Python's standard library, as pairs of docstring and body."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from functools import cache
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "__pycache__"}
# Modules are of very different sizes (tkinter alone has a twelfth of the functions): with this one, splits of 0.1 and
# 0.1 of the modules hold 0.098 and 0.103 of the functions of Python 3.11.
_SALT = 24


def standard_library_functions(max_chars: int = 1500, min_chars: int = 40) -> list[dict[str, str]]:
    """Every documented function of the standard library, by module and line; the same list for one Python version.

    Args:
        max_chars: Characters of a function at most, signature, docstring and body together.
        min_chars: Characters of a body at least.

    Returns:
        Rows with `module`, `name`, `prompt` (signature and docstring) and `completion` (body), as they stand in the
        source but without the indentation of a class around them.
    """
    rows, seen = [], set()
    for row in _all_functions():
        body = row["completion"]
        # The same helper is copied into several modules: a copy in the test split would be no test.
        if len(row["prompt"]) + len(body) <= max_chars and len(body.strip()) >= min_chars and body not in seen:
            seen.add(body)
            rows.append(dict(row))
    return rows


@cache
def _all_functions() -> list[dict[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[dict[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED & set(place.parts):
            continue
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        source = path.read_text(encoding="utf-8", errors="replace")
        if "def " in source:
            rows += _functions(source, module)
    return rows


def _functions(source: str, module: str) -> list[dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(source)
    except SyntaxError:  # deliberately broken files, such as lib2to3's
        return []
    lines = [line + "\n" for line in source.split("\n")]  # not splitlines: form feeds are no lines to ast
    found: list[tuple[int, dict[str, str]]] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documented = ast.get_docstring(node, clean=False) and len(node.body) > 1
        doc_end = node.body[0].end_lineno
        if not documented or doc_end is None or node.end_lineno is None:
            continue
        if node.body[1].lineno <= doc_end or node.body[0].lineno <= node.lineno:
            continue  # more than one thing on a line: there is no clean cut
        head, body = lines[node.lineno - 1 : doc_end], lines[doc_end : node.end_lineno]
        indent = len(head[0]) - len(head[0].lstrip(" "))
        row = {
            "module": module,
            "name": node.name,
            "prompt": _without_indent(head, indent),
            "completion": _without_indent(body, indent).strip("\n") + "\n",
        }
        found.append((node.lineno, row))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _without_indent(lines: list[str], indent: int) -> str:
    return "".join(line[indent:] if not line[:indent].strip(" ") else line for line in lines)


def split_of_module(module: str, validation: float, test: float) -> str:
    """The split that all functions of a module belong to, from its name alone: the same in every run.

    >>> split_of_module("json.decoder", validation=0.1, test=0.1)
    'train'
    """
    place = int.from_bytes(hashlib.sha256(f"{_SALT}:{module}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def check_split(validation: float, test: float, max_examples: int | None) -> None:
    """Raises for fractions that leave nothing to train on, and for less than one example."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(f"validation={validation} and test={test} must be fractions that add up to less than 1.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples} must be at least 1.")


def functions_by_split(
    validation: float, test: float, max_examples: int | None, max_chars: int, min_chars: int
) -> dict[str, list[dict[str, str]]]:
    """The functions as "train", "validation" and "test"; no module is on two sides, and empty splits are left out.

    Args:
        validation: Fraction of modules (about) held out for validation.
        test: Fraction of modules (about) held out for test.
        max_examples: Training rows at most, evenly over the library; the others keep their proportion.
        max_chars: As for `standard_library_functions`.
        min_chars: As there.

    Raises:
        ValueError: No function fits the limits.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in standard_library_functions(max_chars, min_chars):
        splits[split_of_module(row["module"], validation, test)].append(row)
    train = len(splits["train"])
    if not train:
        raise ValueError(
            f"no documented function of Python {sys.version_info[0]}.{sys.version_info[1]} has at most max_chars="
            f"{max_chars} and a body of at least min_chars={min_chars} characters."
        )
    share = min(1.0, (max_examples or train) / train)
    return {split: _evenly(rows, max(1, round(share * len(rows)))) for split, rows in splits.items() if rows}


def _evenly(rows: list[dict[str, str]], n: int) -> list[dict[str, str]]:
    return [rows[i * len(rows) // n] for i in range(min(n, len(rows)))]
