"""What commands print: lines, tables, progress."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from crossflow.core.files import is_full


def say(text: str = "") -> None:
    """Prints a line to stdout."""
    click.echo(text)


def warn(text: str) -> None:
    """Prints a line to stderr."""
    click.echo(text, err=True)


@contextmanager
def progress_bar(label: str, after: float = 2.0, every: float = 15.0) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that shows itself when the work takes longer than `after` seconds; (done, total) moves it. Where
    there is no terminal, a line each `every` seconds. Of several processes the first one tells.
    """
    from rich.console import Console
    from rich.progress import Progress

    console, is_first = Console(), os.environ.get("RANK", "0") == "0"
    bar = Progress(console=console, transient=True, disable=not (console.is_terminal and is_first))
    task, told = bar.add_task(label, total=None), time.monotonic()
    # A clock of its own: the first step of a large model, or a solver that counts none, may take long.
    clock = threading.Timer(after, bar.start)
    clock.daemon = True
    clock.start()

    def move(done: int, total: int) -> None:
        nonlocal told
        bar.update(task, completed=done, total=total)
        if is_first and not console.is_terminal and time.monotonic() - told > every:
            told = time.monotonic()
            say(f"{label}: {done} of {total}")

    try:
        yield move
    finally:
        clock.cancel()
        clock.join()
        if bar.live.is_started:
            bar.stop()


def training_progress() -> Any:
    from rich.console import Console

    from crossflow.core.training.tracking import RichProgress

    return RichProgress(Console(stderr=False))


def show_scores(
    values: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    baseline: dict[str, float],
    headline: Sequence[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "this run", "95 % interval", *(["trivial baseline"] if baseline else []))
    names = [name for name in headline if name in values] + [name for name in values if name not in headline]
    for name in names:
        low, high = intervals.get(name, (None, None))
        span = "" if low is None else f"{low:.4g} to {high:.4g}"
        table.add_row(
            name,
            f"{values[name]:.4g}",
            span,
            *([f"{baseline[name]:.4g}" if name in baseline else ""] if baseline else []),
        )
    Console().print(table)


def explain(error: Exception) -> str | None:
    """What a user can do about an error, in one paragraph; None for an error that is not the user's."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} See `{error.ctx.command_path} --help`."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError):
        if is_full(error):
            return "The disk is full. Make room, or choose another --output."
        return None if error.filename is None else f"{error.filename}: {error.strerror}."
    return str(error)
