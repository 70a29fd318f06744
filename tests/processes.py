"""Other processes, ready at once: a warm pair for everything distributed, and children to be killed.

All are forked from one server that has imported everything, so a child costs 0.02 s instead of 7 (FINDINGS, 17).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 2
PRELOAD = "tests.preload"
SHARED = ("CONFORMANCE", "CONFORMANCE_TMP", "LIGHTNING_PEFT_CACHE")


@functools.cache
def context() -> Any:
    """The fork server's context; the server starts here and imports everything once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([PRELOAD])
    # Python 3.11's server looks for the module from the folder it is started in, and says nothing if it is not found.
    with contextlib.chdir(Path(__file__).resolve().parent.parent):
        forkserver.ensure_running()
    return made


def is_preloaded() -> bool:
    """Whether this process was forked with everything imported."""
    return PRELOAD in sys.modules


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Dead(RuntimeError):
    """A process died or got stuck; the message tells which, in what, and where it stood."""


class Child:
    """A process that answers calls until its end of the pipe is closed.

    Args:
        environment: Variables to set before the first call.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (it lives as long as the child)
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = context().Process(target=_serve, args=(theirs, environment, self.log.name))
        self.process.start()
        theirs.close()

    def send(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> None:
        # What the calling test has set since the child was started.
        shared = {name: os.environ[name] for name in SHARED if name in os.environ}
        self.pipe.send_bytes(pickle.dumps((function, args, timeout, shared, os.getcwd())))

    def receive(self) -> tuple[bool, Any]:
        """Whether the call returned, and what (or the traceback); raises `EOFError` if the process died in it."""
        return pickle.loads(self.pipe.recv_bytes())

    def end(self) -> int | None:
        """Kills the process if it is still there; its exit code."""
        self.pipe.close()
        self.process.kill()
        self.process.join(10)
        return self.process.exitcode

    def said(self) -> str:
        """The end of what it wrote to standard error, with its stack if it was stuck."""
        with open(self.log.name, errors="replace") as file:
            return file.read()[-3000:]


def _serve(pipe: Connection, environment: dict[str, str], log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    os.environ.update(environment)
    # A server's child would start its loaders' workers from a server of its own, which has imported nothing.
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            function, args, timeout, shared, folder = pickle.loads(pipe.recv_bytes())
            os.environ.update(shared)
            os.chdir(folder)
            faulthandler.dump_traceback_later(max(timeout - 1, 1))
            try:
                answer = (True, function(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(pickle.dumps(answer))


def call_in_child(function: Callable[..., Any], *args: Any, timeout: float = 60) -> tuple[int | None, Any]:
    """Calls a module-level function in a fresh process: (None, what it returned) or (exit code, None) if it died.

    Raises:
        Dead: The function raised, or did not end in time.
    """
    child = Child({})
    try:
        child.send(function, args, timeout)
        # The sentinel as well: what a dead process has forked (a loader's workers) may still hold the pipe.
        if not wait([child.pipe, child.process.sentinel], timeout):
            raise Dead(f"{function.__name__}{args} did not end in {timeout} s.\n{child.said()}")
        try:
            if not child.pipe.poll():
                raise EOFError
            returned, answer = child.receive()
        except EOFError:
            child.process.join(10)
            return child.process.exitcode, None
    finally:
        child.end()
    if not returned:
        raise Dead(f"{function.__name__}{args} raised in its process:\n{answer}")
    return None, answer


class Pair:
    """Two processes with a gloo group between them, started once and fed with calls."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.codes: list[int | None] = []  # exit codes of the last pair

    def start(self) -> None:
        port = str(free_port())
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
        common["WORLD_SIZE"] = str(RANKS)
        self.children = [Child({**common, "LOCAL_RANK": str(rank)}) for rank in range(RANKS)]

    def stop(self) -> list[int | None]:
        self.codes = [child.end() for child in self.children]
        self.children = []
        return self.codes

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Calls `function(*args)` on both ranks; what each returned.

        Raises:
            Dead: A rank raised, died or got stuck. The pair is ended; the next call starts another.
        """
        if not self.children:
            self.start()
        for child in self.children:
            child.send(function, args, timeout)
        answers: dict[int, Any] = {}
        waiting = {child.pipe: rank for rank, child in enumerate(self.children)}
        patience = timeout
        while waiting:
            ready = wait(list(waiting), patience)
            for pipe in ready or list(waiting):
                rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    answers[rank] = self.children[rank].receive() if ready else (False, self._stuck(rank, patience))
                except EOFError:
                    answers[rank] = (False, f"the process died\n{self.children[rank].said()}")
                if not answers[rank][0]:
                    patience = 3  # the other rank may wait for this one for ever
        failed = {rank: answer for rank, (returned, answer) in answers.items() if not returned}
        if failed:
            self.stop()
            told = "\n".join(f"-- rank {rank}: {answer}" for rank, answer in sorted(failed.items()))
            raise Dead(f"{function.__name__}{args}:\n{told}")
        return [answers[rank][1] for rank in range(RANKS)]

    def kill(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[int | None]:
        """Calls a function that kills its own process, on both ranks; their exit codes. The next call starts anew."""
        try:
            self.run(function, *args, timeout=timeout)
        except Dead:
            return self.codes
        raise Dead(f"{function.__name__}{args} was to kill its process and returned.")

    def _stuck(self, rank: int, patience: float) -> str:
        return f"no answer within {patience:.0f} s\n{self.children[rank].said()}"


@functools.cache
def warm_pair() -> Pair:
    """The pair that all tests of this process share."""
    made = Pair()
    atexit.register(made.stop)
    return made


def run_on_two(function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(rank, *args)` in two processes; what each returned, by rank.

    In them `Trainer(accelerator="cpu", devices=2, strategy="ddp")` or a `ModelParallelStrategy` with
    `process_group_backend="gloo"` joins the two.

    Args:
        function: A module-level function.
        *args: Its further arguments, picklable.
        timeout: Seconds until a process counts as stuck.

    Raises:
        Dead: A process raised, died or got stuck; the message holds its traceback or the end of its output.
    """
    return warm_pair().run(_with_rank, function, args, timeout=timeout)


def _with_rank(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch

    torch.manual_seed(0)  # as every test starts
    return function(int(os.environ["LOCAL_RANK"]), *args)
