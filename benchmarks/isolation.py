"""Runs one function in a process of its own, with a time limit: a network may hang, crash or exhaust its process."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Report = Callable[[dict[str, Any]], None]

_CONTEXT = multiprocessing.get_context("forkserver")


def warm(modules: list[str]) -> None:
    """Import modules once, in the process that later ones are forked from; call it before the first `Job`."""
    _CONTEXT.set_forkserver_preload(modules)


class Job:
    """One call under way.

    Args:
        function: Takes ``report`` and the arguments. What it reports last, before it ends or is ended, is the result.
        arguments: Plain values.
        limit: Seconds.
    """

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> None:
        self._receiver, sender = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run, args=(function, sender, arguments), daemon=True)
        self._process.start()
        sender.close()
        self._limit = limit
        self._deadline: float | None = None  # of the function: a first process also waits for the imports
        self._last: dict[str, Any] = {}
        self.sentinel = self._receiver

    def result(self) -> dict[str, Any] | None:
        """What was reported, and how the process ended under ``ended``; None while it runs."""
        over = False
        try:
            while self._receiver.poll():
                self._last = self._receiver.recv()
                self._deadline = self._deadline or time.monotonic() + self._limit
        except EOFError:
            over = True
        if over:
            self._process.join()
            code = self._process.exitcode
            return self._last | {"ended": "" if code == 0 else f"the process ended with {_named(code)}"}
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._process.kill()
            self._process.join()
            return self._last | {"ended": f"over the time limit of {self._limit:g} s"}
        return None


def _named(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def _run(function: Callable[..., None], sender: Connection, arguments: tuple[Any, ...]) -> None:
    sender.send({})  # the imports are done: the clock starts
    function(sender.send, *arguments)
