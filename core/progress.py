"""How long-running work reports its progress. The command line shows it; the library prints nothing.

`Progress` counts steps, items or bytes; a training also reports numbers and events by `TrainingProgress`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class TrainingProgress(Protocol):
    """An observer of a training, called on the main process only."""

    def begin(self, step: int, total: int) -> None:
        """Training starts after `step` of `total` optimizer steps."""

    def advance(self, step: int) -> None:
        """Called after each optimizer step, with the number of completed ones."""

    def report(self, line: Mapping[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def note(self, text: str) -> None:
        """A sentence about an event: resumed, saved, stopping."""

    def end(self) -> None:
        """Training is over: finished, stopped or failed."""


class Silent:
    """The `TrainingProgress` of a training that nobody watches."""

    def begin(self, step: int, total: int) -> None:
        """Does nothing."""

    def advance(self, step: int) -> None:
        """Does nothing."""

    def report(self, line: Mapping[str, Any]) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def end(self) -> None:
        """Does nothing."""


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(75.2), duration(7300)
    ('1m15s', '2h01m')
    """
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
