"""Stop requests: SIGTERM or Ctrl-C stop a run with a checkpoint after the current step; a second Ctrl-C aborts it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Abandoned(BaseException):  # as KeyboardInterrupt: nothing that handles errors of its own work stops it
    """Work was given up because of a stop request."""


class StopRequest:
    """`with StopRequest() as stop:` catches the signals while inside (main thread only) and puts the old handlers back.

    `stop.received` is the signal's name, or "" before any.
    """

    def __init__(self) -> None:
        self.received = ""
        self._received_at = 0.0
        self._patience: float | None = None  # inside `abandoning`: how long the work may go on after a request
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def abandoning(self, patience: float) -> Iterator[None]:
        """Context of work that ends with `Abandoned` when it goes on for `patience` seconds after SIGTERM or Ctrl-C.

        Only for work that may end anywhere: the exception comes between any two instructions.
        """
        if not self._previous:  # not in the main thread, which alone gets signals
            yield
            return
        self._patience = patience
        try:
            if self.received:
                self._wait()
            yield
        finally:
            self._patience = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _wait(self) -> None:
        """Starts the clock of the patience that is left."""
        assert self._patience is not None
        left = self._received_at + self._patience - time.monotonic()
        if left <= 0:
            self._give_up()
        signal.setitimer(signal.ITIMER_REAL, left)

    def _give_up(self, *signal_and_frame: object) -> None:
        if self._patience is not None:
            self._patience = None
            raise Abandoned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        if self._patience is not None:
            self._wait()


def ignore_in_worker(worker: int = 0) -> None:
    """For data-loading workers: a signal to the process group must not end them during the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
