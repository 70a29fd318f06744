"""Runs of the conformance suite, in its folders."""

from tests.conformance.conftest import _folder

__all__ = ["_folder"]
