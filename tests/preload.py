"""Imported once by the fork server, so that its children start with everything at hand."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import scipy.optimize  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch

torch.set_num_threads(1)  # bit-equality needs the same number everywhere

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402, F401

from lightning_peft.training_cli import import_components  # noqa: E402
from tests.conformance import runs  # noqa: E402, F401

import_components()
