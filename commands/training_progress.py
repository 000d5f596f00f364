"""How a training is shown: a progress bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crossflow.core.progress import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Entries of a training line that the progress line shows in another form, or not at all.
_NOT_A_LOSS = {
    *("kind", "step", "epoch", "lr", "grad_norm", "unconditional", "skipped_steps"),
    *("seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds"),
}


class RichProgress:
    """A bar with losses, step time and remaining time on a terminal; elsewhere one plain line per report."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.total = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, step: int, total: int) -> None:
        """Starts the bar at `step` of `total` optimizer steps."""
        self.total = total
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Progress(*columns, console=self.console, transient=False)
        self._task = self._bar.add_task("train", total=total, completed=step, text="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def report(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics.jsonl: training lines beside the bar, the others as a line of text."""
        if line["kind"] == "train" and self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=describe(line, self.total))
        elif line["kind"] != "sample":
            self.note(f"step {line['step']}/{self.total} {describe(line, self.total)}")

    def note(self, text: str) -> None:
        """Prints a sentence."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Removes the bar."""
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
