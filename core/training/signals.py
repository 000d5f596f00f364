"""Stop requests: SIGTERM or Ctrl-C stop a run with a checkpoint after the current step; a second Ctrl-C aborts it."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
    """`with StopRequest() as stop:` catches the signals while inside (main thread only) and puts the old handlers back.

    `stop.received` is the signal's name, or "" before any.
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


def ignore_in_worker(worker: int = 0) -> None:
    """For data-loading workers: a signal to the process group must not end them during the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
