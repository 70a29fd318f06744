"""What the conformance tests share."""

from __future__ import annotations

import pytest

from tests import processes


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
    return processes.warm_pair()


@pytest.fixture(autouse=True)
def _timed(request, tmp_path, monkeypatch):
    """Marks the report with its technique and starts in an empty folder."""
    technique = getattr(getattr(request.node, "callspec", None), "params", {}).get("technique")
    if technique is not None:
        request.node.user_properties.append(("technique", technique.name))
    monkeypatch.chdir(tmp_path)
