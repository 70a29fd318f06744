"""Two real processes with gloo, for tests of what ranks do together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 2


def run_on_two(function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(rank, *args)` in two fresh processes; what each returned, by rank.

    In them `Trainer(accelerator="cpu", devices=2, strategy="ddp")` or a `ModelParallelStrategy` with
    `process_group_backend="gloo"` joins the two. They are forked from a server that has imported everything already.

    Args:
        function: A module-level function.
        *args: Its further arguments, picklable.
        timeout: Seconds until a process counts as stuck.

    Raises:
        RuntimeError: A process raised, died or got stuck; the message holds its traceback or the end of its output.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch.strategies", "transformers", "peft", "datasets"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            log = str(Path(folder) / f"rank{rank}.log")
            process = context.Process(target=_child, args=(rank, port, theirs, log, pickle.dumps((function, args))))
            process.start()
            theirs.close()
            pipes[ours] = rank
            processes.append(process)
        try:
            return _gather(pipes, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _gather(pipes: dict[Connection, int], timeout: float, logs: Path) -> list[Any]:
    answers: dict[int, Any] = {}
    failed: dict[int, str] = {}
    while pipes:
        ready = wait(list(pipes), timeout)
        for pipe in ready or list(pipes):
            rank = pipes.pop(pipe)  # type: ignore[index]
            end = (logs / f"rank{rank}.log").read_text(errors="replace")[-3000:]
            try:
                if not ready:
                    raise TimeoutError
                returned, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, TimeoutError) as error:
                returned, answer = False, f"{'died' if isinstance(error, EOFError) else 'got stuck'}\n{end}"
            if returned:
                answers[rank] = answer
            else:
                failed[rank] = answer
                timeout = 3  # the other rank may wait for this one for ever
    if failed:
        raise RuntimeError("\n".join(f"-- rank {rank}: {told}" for rank, told in sorted(failed.items())))
    return [answers[rank] for rank in range(RANKS)]


def _child(rank: int, port: int, pipe: Connection, log: str, call: bytes) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        answer = pickle.dumps((True, function(rank, *args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
    # Not through interpreter shutdown: a process group whose peer is gone would hang there.
    os._exit(0)
