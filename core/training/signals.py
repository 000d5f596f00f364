"""Stop requests: SIGTERM or Ctrl-C stop a run with a checkpoint after the current step; a second Ctrl-C aborts it.

Of several processes any may get the signal.
"""

import itertools
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from crossflow.core import distributed
from crossflow.core.distributed import Abandoned

_EVERY = 0.25  # seconds between two looks at what the other processes received


class StopRequest:
    """`with StopRequest() as stop:` catches the signals while inside (main thread only) and puts the old handlers back.

    `stop.received` is the signal's name, or "" before any.
    """

    def __init__(self) -> None:
        self.received = ""
        self._received_at = 0.0
        self._patience: float | None = None  # inside `abandoning`: how long the work may go on after a request
        self._previous: dict[signal.Signals, Any] = {}
        self._relay: _Relay | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
            if hasattr(signal, "SIGALRM"):
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
            if distributed.is_distributed():
                self._relay = _Relay()
        return self

    def __exit__(self, *error: object) -> None:
        if self._relay is not None:
            self._relay.end()
            self._relay = None
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
            _ring_after(0)

    def _wait(self) -> None:
        """Starts the clock of the patience that is left."""
        assert self._patience is not None
        left = self._received_at + self._patience - time.monotonic()
        if left <= 0:
            self._give_up()
        _ring_after(left)

    def _give_up(self, *signal_and_frame: object) -> None:
        if self._patience is not None:
            self._patience = None
            raise Abandoned(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        if self._patience is not None:
            self._wait()


def _ring_after(seconds: float) -> None:
    """SIGALRM to this process; 0: none. Without alarms (Windows) the work that was to be given up ends by itself."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


class _Relay:
    """Hands the signal of one process on to the others, as SIGTERM, whatever their main threads wait for.

    Python's handlers run in the main thread, which may be waiting for another process. So the interpreter writes the
    signal to a socket when it comes, and a thread passes it on through the store of the processes.
    """

    _numbers = itertools.count()  # of the trainings, the same in every process

    def __init__(self) -> None:
        self._name = f"crossflow/stop/{next(self._numbers)}"
        self._store = distributed.new_store()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Hands nothing on any more."""
        signal.set_wakeup_fd(self._previous)
        self._writer.close()  # which wakes the thread
        self._thread.join(1)  # it may wait for a store whose process hangs
        self._reader.close()

    def _run(self) -> None:
        is_stopped = False
        try:
            while not is_stopped:
                ready, _, _ = select.select([self._reader], [], [], _EVERY)
                received = self._reader.recv(64) if ready else b""
                if ready and not received:
                    return
                if {signal.SIGTERM, signal.SIGINT} & set(received):
                    self._store.set(self._name, "")
                    return
                is_stopped = self._store.check([self._name])
        except (RuntimeError, OSError, ValueError):
            return  # the process that holds the store has ended, which the main thread notices; or this one ends
        main = threading.main_thread().ident
        assert main is not None
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGTERM)
        else:
            signal.raise_signal(signal.SIGTERM)


def ignore_in_worker(worker: int = 0) -> None:
    """For data-loading workers: a signal to the process group must not end them during the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
