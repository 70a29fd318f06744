"""What the conformance tests share, and the seconds that each technique took."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

from tests.conformance import processes

BUDGET = 1.0  # seconds a technique in `make test`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full product of the conformance suite's columns")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full", False):
        os.environ["CONFORMANCE"] = "full"


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory):
    """Where networks are kept that are named by folder, and what runs write by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFORMANCE_TMP", str(tmp_path_factory.mktemp("conformance")))
        patch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sys.argv", ["lightning-peft"])
        yield


@pytest.fixture(scope="session")
def pair(_folder):
    """Two warm processes with a gloo group between them."""
    made = processes.Pair()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _timed(request, tmp_path, monkeypatch):
    """Marks the report with its technique and starts in an empty folder."""
    technique = getattr(getattr(request.node, "callspec", None), "params", {}).get("technique")
    if technique is not None:
        request.node.user_properties.append(("technique", technique.name))
    monkeypatch.chdir(tmp_path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seconds of each technique, over all its columns."""
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
