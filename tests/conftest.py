"""Fixtures every test may use: tiny networks of each family, a tokenizer, and a fixed seed."""

from __future__ import annotations

import os
from collections import defaultdict

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before a kernel's module is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BUDGET = 1.0  # seconds of a technique in the conformance suite, in `make test`


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seconds of each technique in the conformance suite, over all its columns."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            technique = dict(getattr(report, "user_properties", [])).get("technique")
            if technique is not None:
                seconds[technique] += report.duration
    if not seconds:
        return
    full = os.environ.get("CONFORMANCE") == "full"
    terminalreporter.section("conformance: seconds a technique" + ("" if full else f" (budget {BUDGET:.0f})"))
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        over = "  over the budget" if spent > BUDGET and not full else ""
        terminalreporter.write_line(f"{spent:7.2f}  {name}{over}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.2f}  in all, {len(seconds)} techniques")
