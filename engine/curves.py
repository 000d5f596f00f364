"""The curves of runs, laid over each other: as a PNG and as characters for a terminal."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crossflow.core.errors import UserError
from crossflow.core.files import replacing
from crossflow.engine.folder import RunFolder
from crossflow.engine.run_log import CLOCK, Curve, RunLog, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Axis = Literal["steps", "minutes", "cpu minutes"]
_CLOCKS = {"minutes": "seconds_per_step", "cpu minutes": "cpu_seconds_per_step"}
MARKS = "•×+o*#@%"
"""The character of each run in a terminal; runs beyond these repeat them."""


@dataclass(frozen=True)
class Panel:
    """A number of all runs that log it: by the run's name, points (x, y) in ascending x."""

    name: str
    lines: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def is_logarithmic(self) -> bool:
        """Whether values are positive and span more than a factor of ten."""
        values = [y for points in self.lines.values() for _, y in points]
        return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def read_panels(folders: Sequence[Path], x: Axis = "steps", names: Sequence[str] = ()) -> list[Panel]:
    """The curves of runs: losses, gradient norm, validation (`val/NAME`), and scores at the end (`score/NAME`).

    names: those to draw, such as `flow`, `val/flow`, `lr`; by default all but the clock's and the schedule's. Raises
    UserError for a folder without a log, and for a name that no run has.
    """
    labels = _labels(folders)
    logs = {label: read_log(folder) for label, folder in zip(labels, folders, strict=True)}
    lines: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for label, folder in zip(labels, folders, strict=True):
        log = logs[label]
        for name, curve in _curves(log, RunFolder(folder)).items():
            clean = curve.without_gaps()
            places = clean.steps if x == "steps" else log.minutes(clean.steps, _CLOCKS[x])
            if clean.values:
                lines.setdefault(name, {})[label] = list(zip(map(float, places), clean.values, strict=True))
    if unknown := [name for name in names if name not in lines]:
        raise UserError(f"No run has logged {', '.join(unknown)}. Logged: {', '.join(lines)}.")
    hidden = {"lr", "epoch", "unconditional"} | CLOCK
    chosen = names or [name for name in lines if name not in hidden]
    return [Panel(name, lines[name]) for name in chosen]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise UserError(f"A run is named twice: {', '.join(labels)}.")
    return labels


def _curves(log: RunLog, run: RunFolder) -> dict[str, Curve]:
    curves = {name: log.curve(name) for name in log.names("train")}
    curves |= {f"val/{name}": log.curve(name, "val") for name in log.names("val")}
    content = run.read_scores()
    for name, value in content.get("scores", {}).items():
        if value is not None and name in content["intervals"]:
            curves[f"score/{name}"] = Curve(name, (content["step"],), (float(value),))
    return curves


# -- in a terminal


def text_chart(panel: Panel, *, width: int = 72, height: int = 12) -> list[str]:
    """A panel as lines of characters: title, `height` rows of a field `width` wide with the scale of y, scale of x."""
    scale = math.log10 if panel.is_logarithmic else float
    points = [(x, scale(y)) for line in panel.lines.values() for x, y in line]
    left, right = _bounds([x for x, _ in points])
    low, high = _bounds([y for _, y in points])
    field = [[" "] * width for _ in range(height)]
    for number, line in enumerate(panel.lines.values()):
        mark = MARKS[number % len(MARKS)]
        for column, y in _sampled([(x, scale(value)) for x, value in line], left, right, width):
            row = round((high - y) / (high - low) * (height - 1))
            field[min(height - 1, max(0, row))][column] = mark
    back: Callable[[float], float] = (lambda y: 10**y) if panel.is_logarithmic else float
    keys = "  ".join(f"{MARKS[number % len(MARKS)]} {label}" for number, label in enumerate(panel.lines))
    rows = [f"{panel.name}{' (logarithmic)' if panel.is_logarithmic else ''}    {keys}"]
    for number, cells in enumerate(field):
        y = back(high - (high - low) * number / max(1, height - 1))
        tick = f"{y:.4g}" if number in (0, height // 2, height - 1) else ""
        rows.append(f"{tick:>10} │{''.join(cells)}".rstrip())
    rows.append(f"{'':>10} └{'─' * width}")
    rows.append(f"{'':>11}{left:<{width // 2}.4g}{right:>{width - width // 2}.4g}")
    return rows


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest value, apart even if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9)


def _sampled(points: Sequence[tuple[float, float]], left: float, right: float, width: int) -> list[tuple[int, float]]:
    """(column, y) of a line: its points, and in the columns between two of them the straight line."""
    columns = [(round((x - left) / (right - left) * (width - 1)), y) for x, y in points]
    marks = list(columns[:1])
    for (start, y0), (stop, y1) in itertools.pairwise(columns):
        num = max(1, stop - start)
        marks += [(start + k, y0 + (y1 - y0) * k / num) for k in range(1, num + 1)] if stop > start else [(stop, y1)]
    return marks


# -- as a picture


def save_chart(panels: Sequence[Panel], path: Path, *, x: Axis = "steps") -> Path:
    """Writes the panels as a PNG with a legend of the runs; returns its path."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    legend = 0.22 * math.ceil(len(labels) / 4) if len(labels) > 1 else 0.0
    width, height = 4.6 * columns, 2.9 * rows + legend
    figure = Figure(figsize=(width, height))
    # Margins in inches; a layout that measures every label takes seconds for the panels of a joint run.
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.1 / width, top=1 - 0.3 / height, bottom=(legend + 0.5) / height,
        wspace=0.8 / 3.8, hspace=0.8 / 2.1,
    )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, place in zip(panels, axes, strict=False):
        _draw(place, panel, labels)
        place.set_xlabel(x, fontsize=8)
    for place in axes[len(panels) :]:
        place.remove()
    if len(labels) > 1:
        handles = [axes[0].plot([], [], color=f"C{number % 10}")[0] for number in range(len(labels))]
        figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _draw(axes: "Axes", panel: Panel, labels: Sequence[str]) -> None:
    for label, points in panel.lines.items():
        marker = "o" if len(points) < 12 else None
        axes.plot(*zip(*points, strict=True), color=f"C{labels.index(label) % 10}", linewidth=1.2, marker=marker)
    if panel.is_logarithmic:
        axes.set_yscale("log")
    axes.set_title(panel.name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
