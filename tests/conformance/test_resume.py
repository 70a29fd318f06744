"""Killed in mid-epoch by SIGKILL and gone on with: the same bits as the run that nobody stopped."""

from __future__ import annotations

import signal
import zlib

import pytest

from tests.conformance.compare import assert_same
from tests.conformance.runs import STEPS, Run, once, result, result_by_yaml
from tests.conformance.table import full, techniques, variants, why_not
from tests.processes import call_in_child

#: Two epochs of three steps: in mid-epoch; at the border, where a technique chooses anew; one before and one after it.
KILLS = (1, 2, 3, 4, 5)


def kills(technique) -> tuple[int, ...]:
    """One step of the middle of an epoch, another for each technique; or all."""
    return KILLS if full() else (zlib.crc32(technique.name.encode()) % 2 + 4,)


def uninterrupted(technique, **changes) -> Run:
    return Run(technique.path, optimizer="adamw", dropout=0.1, **changes)


@techniques("resume")
@variants("way", "yaml", "python")
@variants("accumulate", 1, 3)
def test_resume(technique, way, accumulate, tmp_path):
    """By the command line's `--ckpt_path last`, or by `trainer.fit(ckpt_path=...)`."""
    way = "python" if why_not(technique, "yaml") else way
    accumulate = 1 if why_not(technique, "accumulation") else accumulate
    run = uninterrupted(technique, accumulate=accumulate)
    whole = once(run)
    go = result_by_yaml if way == "yaml" else result
    for step in kills(technique):
        folder = tmp_path / str(step)
        killed = run.but(folder=str(folder), save=True, kill_at=step)
        code, _ = call_in_child(go, killed)
        assert code == -signal.SIGKILL, "the run was to be killed and ended by itself"
        last = "last" if way == "yaml" else str(folder / "last.ckpt")
        resumed = go(killed.but(kill_at=None, resume=last))
        what = f"killed in step {step + 1} of {STEPS} and resumed ({way}), against uninterrupted"
        assert resumed.losses == whole.losses[step:], what
        assert_same(resumed.weights, whole.weights, 0.0, what)


@pytest.mark.skipif(not full(), reason="the full product")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@techniques("resume", "ddp", "fsdp2")
def test_resume_on_two(technique, strategy, tmp_path, pair):
    """Both ranks are killed; under FSDP2 the checkpoint is a distributed one."""
    run = uninterrupted(technique, strategy=strategy)
    whole, _ = pair.run(result, run)
    for step in KILLS:
        folder = tmp_path / str(step)
        killed = run.but(folder=str(folder), save=True, kill_at=step)
        assert pair.kill(result, killed) == [-signal.SIGKILL, -signal.SIGKILL]
        saved = folder / f"step={step}.ckpt"
        resumed, _ = pair.run(result, killed.but(kill_at=None, save=False, resume=str(saved)))
        what = f"{strategy}, killed in step {step + 1} of {STEPS} and resumed, against uninterrupted"
        assert resumed.losses == whole.losses[step:], what
        assert_same(resumed.weights, whole.weights, 0.0, what)
