"""Stop requests: SIGTERM or Ctrl-C stop a run with a checkpoint after the current step; a second Ctrl-C aborts it.

Of several processes any may get the signal.
"""

import itertools
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from crossflow.core import distributed
from crossflow.core.distributed import Abandoned

_EVERY = 0.25  # seconds between two looks at what the other processes received


class StopRequest:
    """`with StopRequest() as stop:` catches the signals while inside (main thread only) and puts the old handlers back.

    `stop.received` is the signal's name, or "" before any.

    rescue: with several processes, what a thread does where the work inside `at_rest` goes on for `patience` seconds
    after a request. None of them can give up such work, in which the others take part.
    """

    def __init__(self, rescue: Callable[[], None] | None = None, patience: float = 0) -> None:
        self._rescue = rescue or (lambda: None)
        self._rescue_after = patience
        self._not_at_rest = threading.Lock()
        self._not_at_rest.acquire()
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
                self._relay = _Relay(self._rescue_at_rest, self._rescue_after)
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

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Context of work that changes nothing of what `rescue` saves. It ends after a `rescue` that has begun."""
        self._not_at_rest.release()
        try:
            yield
        finally:
            self._not_at_rest.acquire()

    def _rescue_at_rest(self) -> bool:
        """Runs `rescue` if the work is at rest; returns whether it is."""
        is_at_rest = self._not_at_rest.acquire(blocking=False)
        if is_at_rest:
            try:
                self._rescue()
            finally:
                self._not_at_rest.release()
        return is_at_rest

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

    rescue: called `patience` seconds after the signal, again and again until it returns True, unless `end` comes first.
    """

    _numbers = itertools.count()  # of the trainings, the same in every process

    def __init__(self, rescue: Callable[[], bool], patience: float) -> None:
        self._rescue, self._patience = rescue, patience
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
        try:
            if self._stop_all():
                deadline = time.monotonic() + self._patience
                while self._received(_EVERY) is not None:
                    if time.monotonic() >= deadline and self._rescue():
                        return
        except (RuntimeError, OSError, ValueError):
            return  # the process that holds the store has ended, which the main thread notices; or this one ends

    def _received(self, seconds: float) -> bytes | None:
        """The signals that come within `seconds`; None at the end."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        return (self._reader.recv(64) or None) if ready else b""

    def _stop_all(self) -> bool:
        """Waits for a signal to any process, and passes it on to the others or to this one; False: none came."""
        while not self._store.check([self._name]):
            received = self._received(_EVERY)
            if received is None:
                return False
            if {signal.SIGTERM, signal.SIGINT} & set(received):
                self._store.set(self._name, "")
                return True
        main = threading.main_thread().ident
        assert main is not None
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGTERM)
        else:
            signal.raise_signal(signal.SIGTERM)
        return True


def ignore_in_worker(worker: int = 0) -> None:
    """For data-loading workers: a signal to the process group must not end them during the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
