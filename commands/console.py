"""What commands print: lines, tables, scores, progress, and the message for an error."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.core import launcher
from crossflow.core.errors import UserError
from crossflow.core.files import is_full

if TYPE_CHECKING:
    from crossflow.commands.training_progress import RichProgress
    from crossflow.core.progress import Progress

MAX_LISTED = 20
"""Longer lists of problems are cut, with a line that says how many follow."""


def wants_json() -> bool:
    """Whether the command that runs was given --json, so that stdout belongs to its result."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("as_json"))


def say(text: str = "") -> None:
    """Prints a line to stdout, or to stderr under --json."""
    click.echo(text, err=wants_json())


def print_json(content: object) -> None:
    """Prints the result of a command as indented JSON to stdout; numbers that JSON does not have become null."""
    click.echo(json.dumps(_finite(content), ensure_ascii=False, indent=1))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_file(path: Path) -> None:
    """Shows a picture or page in the desktop's viewer; says so where there is none."""
    if click.launch(str(path)) != 0:
        warn(f"note: no program of this desktop shows {path}.")


def warn(text: str) -> None:
    """Prints a line to stderr."""
    click.echo(text, err=True)


def is_first_process() -> bool:
    """Whether this is the first process of a launcher, or the only one; without joining the process group."""
    return launcher.rank() == 0


def join_processes() -> None:
    """Joins the processes of a launcher, if there are several."""
    if launcher.world_size() > 1:
        from crossflow.core import distributed

        distributed.device()


def count(number: int, noun: str) -> str:
    """`1 file`, `3 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def warn_each(lines: Sequence[str], where: str = "") -> None:
    """Prints the first lines to stderr, and how many follow; where: where to find those."""
    for line in lines[:MAX_LISTED]:
        warn(line)
    if len(lines) > MAX_LISTED:
        warn(f"and {len(lines) - MAX_LISTED} more{where and f' {where}'}")


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Prints rows in columns, as wide as the terminal, or 160 characters where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header) if header else Table(box=None, show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))  # Text: square brackets are not markup
    Console(width=None if sys.stdout.isatty() else 160, stderr=wants_json()).print(table)


def show_scores(
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    baseline: Mapping[str, float],
    headline: Sequence[str],
) -> None:
    """Prints a table of scores, those of the headline first, beside their intervals and the trivial baseline.

    The shuffled control of a score stands in its baseline column (see `score_table`).
    """
    from crossflow.benchmarks.score_table import score_rows

    table = score_rows(values, intervals, baseline)
    table.sort(key=lambda row: headline.index(row.name) if row.name in headline else len(headline))
    with_baseline = any(row.baseline is not None for row in table)
    rows = []
    for row in table:
        interval = "" if row.interval is None else f"{row.interval[0]:.4g} to {row.interval[1]:.4g}"
        base = "" if row.baseline is None else f"{row.baseline:.4g}{' (shuffled)' * row.is_controlled}"
        rows.append((row.name, f"{row.value:.4g}", interval, *([base] if with_baseline else [])))
    print_table(rows, ("score", "this run", "95 % interval", *(["trivial baseline"] if with_baseline else [])))


def training_progress() -> "RichProgress":
    """The progress display of a training."""
    from rich.console import Console

    from crossflow.commands.training_progress import RichProgress

    return RichProgress(Console(stderr=False))


@contextmanager
def progress_bar(label: str, after: float = 2.0, every: float = 15.0) -> Iterator["Progress"]:
    """A progress bar, moved by calls of the yielded function with (done, total).

    It appears when the work takes longer than `after` seconds; without a terminal, a line is printed each `every`
    seconds instead. Of several processes only the first one shows anything.
    """
    from rich.console import Console
    from rich.progress import Progress as Bar

    console, is_first = Console(stderr=wants_json()), is_first_process()
    bar = Bar(console=console, transient=True, disable=not (console.is_terminal and is_first))
    task, last_line = bar.add_task(label, total=None), time.monotonic()
    # A separate timer: the first step of a large model, or a solver that reports no steps, may take long.
    timer = threading.Timer(after, bar.start)
    timer.daemon = True
    timer.start()

    def move(done: int, total: int) -> None:
        nonlocal last_line
        bar.update(task, completed=done, total=total)
        if is_first and not console.is_terminal and time.monotonic() - last_line > every:
            last_line = time.monotonic()
            say(f"{label}: {done} of {total}")

    try:
        yield move
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()


def explain(error: UserError | OSError | click.ClickException) -> str | None:
    """What a user can do about an error, in one paragraph; None for an error that is not the user's."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        problem = " ".join(error.format_message().split()).rstrip(".")  # click lists choices on lines of their own
        return f"{problem}. See `{error.ctx.command_path} --help`."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError):
        if is_full(error):
            return "The disk is full. Make room, or choose another --output."
        return None if error.filename is None else f"{error.filename}: {error.strerror}."
    return str(error)
