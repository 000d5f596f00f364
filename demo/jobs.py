"""What computes for a visitor: in turn, with progress, until it is cancelled; its errors become sentences."""

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.core.progress import Progress

logger = logging.getLogger(__name__)
TURN = "models"
"""Name of the queue that all computing events share: the models are used by a single visitor at a time."""


class Cancelled(BaseException):
    """Leaves a computation from within its progress callback. Not an Exception: nothing on the way out handles it."""


class Jobs:
    """Runs the computations of a page one after another. A visitor (a session) cancels its own alone."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._running: dict[str, threading.Event] = {}

    def endpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An event handler of a function whose first parameter is `on_step` and whose others are fields of the form.

        The names of the fields are those of the API.
        """
        fields = list(inspect.signature(function).parameters.values())[1:]
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        request = inspect.Parameter("request", keyword, annotation=gr.Request)
        progress = inspect.Parameter("progress", keyword, default=gr.Progress())

        @functools.wraps(function)
        def handle(*values: object) -> Any:
            *entered, visitor, bar = values
            assert callable(bar), "gradio fills in what it finds in the signature"
            try:
                with self.work(getattr(visitor, "session_hash", None) or "", bar) as on_step:
                    return function(on_step, *entered)
            except Cancelled:
                gr.Info("Cancelled.", title="Stopped", duration=3)
                return gr.skip()  # what was shown before stays

        handle.__signature__ = inspect.Signature([*fields, request, progress])  # type: ignore[attr-defined]
        handle.__annotations__ = {"request": gr.Request}
        return handle

    @contextmanager
    def work(self, session: str, bar: Callable[..., object]) -> Iterator[Progress]:
        """The callback to which a computation reports its steps; raises gr.Error in place of what goes wrong, and
        Cancelled.
        """
        cancelled = threading.Event()

        def on_step(done: int, total: int) -> None:
            if cancelled.is_set():
                raise Cancelled
            bar((done, total), desc="Computing", unit="steps")

        with self._turn:
            self._running[session] = cancelled
            try:
                with sentences():
                    yield on_step
            finally:
                self._running.pop(session, None)

    def cancel(self, request: gr.Request) -> None:
        """Ends the computation of the visitor, if one is running, at its next step."""
        running = self._running.get(request.session_hash or "")
        if running is not None:
            running.set()


@contextmanager
def sentences() -> Iterator[None]:
    """Errors of a visitor's request as sentences on the page, and of the server in its log alone."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), title="Please change something", print_exception=False) from error
    except (*PARSING_ERRORS, MemoryError) as error:
        logger.exception("a request failed")
        raise gr.Error(
            "The server could not compute this; its log says why.", title="Not computed", print_exception=False
        ) from error
