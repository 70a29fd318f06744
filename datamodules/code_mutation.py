"""Plausible mistakes: Python code with one operator, constant, condition or statement changed."""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Iterator

_COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
_ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
    ast.Mod: ("%", "//"),
}
#: Replace the bytes [begin, end) by these.
Edit = tuple[int, int, bytes]


def mutated(code: str, context: str = "", n: int | None = None, seed: int = 0) -> list[str]:
    """Variants of the code with one mistake each, that still parse and are another program.

    Mistakes: a comparison off by its boundary or negated, + for - and their like, `and` for `or`, a lost `not`, an
    integer off by one, True for False, a statement left out. That a variant fails is likely, not shown: run tests where
    there are any.

    Args:
        code: What is changed: a module, or the (indented) body of a function.
        context: What stands before it, unchanged, such as a signature and a docstring.
        n: Variants at most, drawn at random, the same for the same text and seed; by default all, by their places.
        seed: Seed of the draw.

    Returns:
        Variants of `code`; none if it is no Python.
    """
    before, tree = _parsed(code, context)
    if tree is None:
        return []
    source, begin, original = (before + code).encode(), len(before.encode()), ast.dump(tree)
    edits = [edit for edit in sorted(_edits(source, tree)) if edit[0] >= begin]
    if n is not None:
        random.Random(f"{seed}:{context}{code}").shuffle(edits)
    found: list[str] = []
    for first, last, new in edits:
        if n is not None and len(found) >= n:
            break
        changed = (source[:first] + new + source[last:]).decode()
        other = _tree(changed)
        if other is not None and ast.dump(other) != original and changed[len(before) :] not in found:
            found.append(changed[len(before) :])
    return found


def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _parsed(code: str, context: str) -> tuple[str, ast.Module | None]:
    """What has to stand before the code for it to parse, and its tree."""
    tree = None
    for before in (context, "", "def _():\n", "async def _():\n"):
        if (tree := _tree(before + code)) is not None:
            return before, tree
    return "", tree


def _edits(source: bytes, tree: ast.Module) -> Iterator[Edit]:
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split(b"\n"))]

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def between(left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edit]:
        """The operator in the gap between two nodes, where only blanks and brackets stand beside it."""
        match = re.search(old.encode(), source[end(left) : begin(right)])
        if match:
            yield end(left) + match.start(), end(left) + match.end(), new.encode()

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                yield from between(left, right, *_COMPARISONS[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            old, new = _ARITHMETIC[type(node.op)]
            yield from between(node.left, node.right, re.escape(old), new)
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in itertools.pairwise(node.values):
                yield from between(left, right, *words)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield begin(node), begin(node.operand), b""
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield begin(node), end(node), str(not node.value).encode()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield begin(node), end(node), str(node.value + 1).encode()
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not _is_text(node):
            line = source.rfind(b"\n", 0, begin(node)) + 1
            behind = source.find(b"\n", end(node))
            alone = not source[line : begin(node)].strip() and behind >= 0 and not source[end(node) : behind].strip()
            if alone:
                yield line, behind + 1, b""


def _is_text(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)
