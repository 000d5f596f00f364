"""What is told about a run while it goes on: progress for whoever watches, json lines and trackers for later.

`metrics.jsonl` has one object per line with `kind` (train, val, sample), `step` (completed optimizer steps) and
numbers.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import write_atomically

# Modules whose presence makes a tracker usable.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
# Numbers of a training line that are shown otherwise, or not at all, on the progress line.
_NOT_A_LOSS = {"kind", "step", "epoch", "lr", "grad_norm", "seconds_per_step", "samples_per_second", "skipped_steps"}


class Progress(Protocol):
    """Somebody who watches a run. Called on the main process only; the command line gives an implementation."""

    def begin(self, step: int, total: int) -> None:
        """Training starts after `step` of `total` optimizer steps."""

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done; called after each."""

    def report(self, line: Mapping[str, Any]) -> None:
        """A line went to metrics.jsonl."""

    def note(self, text: str) -> None:
        """Something happened that is worth a sentence: resumed, saved, stopping."""

    def end(self) -> None:
        """Training is over, for whatever reason."""


class Silent:
    """Nobody watches."""

    def begin(self, step: int, total: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def report(self, line: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


class RichProgress:
    """A bar with losses, step time and remaining time on a terminal; elsewhere one plain line per report."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = 0
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def begin(self, step: int, total: int) -> None:
        self.total = total
        if not self.console.is_terminal:
            return
        columns = (
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Bar(*columns, console=self.console, transient=False)
        self._task = self._bar.add_task("train", total=total, completed=step, text="")
        self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def report(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "train" and self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=describe(line, self.total))
        elif line["kind"] != "sample":
            self.note(f"step {line['step']}/{self.total} {describe(line, self.total)}")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def describe(line: Mapping[str, Any], total: int) -> str:
    """A line of metrics.jsonl in words: the losses, and for training the step time and the time that remains."""
    numbers = {
        name: value for name, value in line.items() if name not in _NOT_A_LOSS and isinstance(value, (int, float))
    }
    words = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    if line["kind"] != "train":
        return f"{line['kind']}: {words}"
    seconds = line["seconds_per_step"]
    return f"{words}  {seconds:.3g} s/step  {duration(seconds * (total - line['step']))} left"


def duration(seconds: float) -> str:
    """`75.2` -> `1m15s`, `7300` -> `2h01m`."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class MetricsFile:
    """Appends json lines, each complete on disk before the next; lines after a step can be taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Numbers that JSON cannot hold (NaN, infinities) become null. Raises UserError on a full disk."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). Checkpoints are untouched. Make room or choose "
                "another --output, then continue with --resume auto."
            ) from error

    def truncate(self, step: int) -> dict[str, dict[str, Any]]:
        """Keeps the lines up to `step`, so that a resumed run writes none twice; returns the last of each kind.

        A last line that was never finished goes too.
        """
        if not self.path.exists():
            return {}
        lines = [(text, _parse(text)) for text in self.path.read_text(encoding="utf-8").splitlines()]
        kept = [(text, line) for text, line in lines if line is not None and line["step"] <= step]
        write_atomically(self.path, "".join(text + "\n" for text, _ in kept))
        return {line["kind"]: line for _, line in kept}


def _parse(text: str) -> dict[str, Any] | None:
    """The line, or None when it is not one of ours."""
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], int) and isinstance(line["kind"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError unless every named tracker is known and its package is installed."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if not any(importlib.util.find_spec(module) for module in TRACKERS[name]):
            raise UserError(
                f"train.trackers names {name}, whose package is not installed. Run `pip install "
                f"{TRACKERS[name][0]}`, or leave it out: metrics.jsonl is always written."
            )
