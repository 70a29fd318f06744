"""A checkpoint that an earlier version saved is loaded and trained on, with the losses that version had."""

from __future__ import annotations

import pytest
import torch

from tests.regression.saved import FOLDER, KEY, go_on, path_of, unpacked, wanted


@pytest.mark.parametrize("component", wanted(), ids=lambda component: component.name)
def test_a_saved_checkpoint_goes_on(component, tmp_path):
    assert path_of(component).exists(), (
        f"{component.name} has no saved checkpoint: commit it, then .venv/bin/python -m tests.regression.saved"
    )
    checkpoint = unpacked(component, tmp_path)
    expected = torch.load(checkpoint, weights_only=True)[KEY]
    # Loose, because kernels of another torch round otherwise; a weight or state that was lost is far off.
    assert go_on(component, checkpoint, tmp_path) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_every_saved_checkpoint_is_a_technique_of_today():
    assert {path.name for path in FOLDER.iterdir()} <= {path_of(component).name for component in wanted()}
