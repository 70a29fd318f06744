"""Other processes, ready at once: a warm pair for everything distributed, and children to be killed.

All are forked from one server that has imported everything, so a child costs 0.1 s instead of 8 (FINDINGS, 17).
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 2


def context() -> Any:
    """The fork server's context; the server starts with the first child and imports everything once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.conformance.preload"])
    return made


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
        # The server may have started before these were set, for another test's processes.
        shared = ("CONFORMANCE", "CONFORMANCE_TMP", "LIGHTNING_PEFT_CACHE")
        environment = {name: os.environ[name] for name in shared if name in os.environ} | environment
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = context().Process(target=_serve, args=(theirs, environment, self.log.name), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> None:
        self.pipe.send_bytes(pickle.dumps((function, args, timeout)))

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            function, args, timeout = pickle.loads(pipe.recv_bytes())
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
        if not child.pipe.poll(timeout):
            raise Dead(f"{function.__name__}{args} did not end in {timeout} s.\n{child.said()}")
        try:
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
