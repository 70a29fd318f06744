"""The tests' own other processes: forked with everything imported, wherever the test stands."""

from __future__ import annotations

import os

from tests.processes import call_in_child, is_preloaded, run_on_two


def where(rank: int) -> tuple[int, str, bool]:
    return rank, os.getcwd(), is_preloaded()


def test_children_have_everything_imported_and_stand_where_the_test_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call_in_child(where, 7) == (None, (7, str(tmp_path), True))


def test_two_know_their_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_on_two(where) == [(0, str(tmp_path), True), (1, str(tmp_path), True)]
