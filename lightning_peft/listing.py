"""The registry as a table for people: on a terminal, and as `docs/techniques.md`."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.registry import SHARED, Component, Technique, components


def table(rows: Sequence[Technique], width: int = 58) -> str:
    """A line a paper: number, title (cut to `width`), lead component, kind, what works."""
    lines = [("paper", "title", "component", "kind", "works")]
    for row in rows:
        title = row.title if len(row.title) <= width else row.title[: width - 1] + "…"
        lead = row.components[0] if row.components else None
        lines.append((str(row.paper), title, lead.name if lead else "-", lead.kind if lead else "-", row.works))
    sizes = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join([*(cell.ljust(size) for cell, size in zip(line, sizes)), line[4]]) for line in lines)


def markdown(rows: Sequence[Technique]) -> str:
    """The page `docs/techniques.md`."""
    built = sum(bool(row.components) for row in rows)
    parts = [
        "# Techniques\n",
        "Made by `lightning-peft list --format markdown > docs/techniques.md`; a test checks that it is current.\n",
        f"{built} of {len(rows)} papers are built. `lightning-peft fit --help` tells the arguments.\n",
        "| Paper | Title | Components | Works |",
        "|---:|---|---|---|",
    ]
    for row in rows:
        cells = "<br>".join(_cell(component) for component in row.components)
        parts.append(f"| {row.paper} | {row.title} | {cells} | {row.works} |")
    parts += ["\n## Serving all papers\n", "| Component | Kind |", "|---|---|"]
    parts += [f"| `{component.path}` | {component.kind} |" for component in SHARED]
    reasons = [
        f"| `{component.name}` | {column} | {reason} |"
        for _, component in components()
        for column, reason in component.not_applicable.items()
    ]
    if reasons:
        parts += [
            "\n## What does not apply\n",
            "The conformance suite runs every component through every column, save these.\n",
            "| Component | Column | Why |",
            "|---|---|---|",
            *reasons,
        ]
    return "\n".join(parts) + "\n"


def _cell(component: Component) -> str:
    return f"`{component.path.removeprefix('lightning_peft.')}` ({component.kind})"
