"""metrics.jsonl as curves: what a training has logged, also while it is still being written."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossflow.core.errors import UserError
from crossflow.core.training.bad_steps import BAD_STEPS
from crossflow.core.weights import joint_run
from crossflow.engine.folder import METRICS

CLOCK = frozenset(("seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds"))
NOT_A_LOSS = CLOCK | {"kind", "step", "epoch", "lr", "grad_norm", "unconditional", "skipped_steps"}
"""Numbers of a training line that are no losses."""


@dataclass(frozen=True)
class Curve:
    """A logged number over steps; nan where it was not finite.

    >>> curve = Curve("loss", (10, 20, 30, 40), (4.0, 3.0, 2.0, 1.0))
    >>> curve.last_quarter(), curve.finite
    (1.0, True)
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether every value is a finite number."""
        return all(map(math.isfinite, self.values))

    def without_gaps(self) -> "Curve":
        """The finite values alone."""
        pairs = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Curve(self.name, tuple(step for step, _ in pairs), tuple(value for _, value in pairs))

    def quarters(self) -> list[float]:
        """The median of each quarter of the values, in order; fewer for fewer than four values."""
        num = len(self.values)
        bounds = [num * part // min(4, num) for part in range(min(4, num) + 1)] if num else []
        return [statistics.median(self.values[start:stop]) for start, stop in itertools.pairwise(bounds)]

    def last_quarter(self) -> float:
        """The median of the last quarter of the values."""
        return self.quarters()[-1]


@dataclass(frozen=True)
class RunLog:
    """The lines of metrics.jsonl and bad_steps.jsonl by kind (train, val, sample, bad), in the order of their steps."""

    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "RunLog":
        """The log of a run directory, or what the log of a joint run says of a task; empty without one.

        A line that a training is about to write, or that was cut off by a crash, is left out, and so is what a resumed
        run has repeated.
        """
        lines: dict[str, dict[int, dict[str, Any]]] = {}
        root = joint_run(folder)
        place, task = (folder, None) if root is None else (root, folder.absolute().name)
        for line in map(_parse, (*_texts(place / METRICS), *_texts(place / BAD_STEPS))):
            if line is not None:
                line = line if task is None else _of_task(line, task)
                lines.setdefault(line["kind"], {})[line["step"]] = line
        return cls({kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in lines.items()})

    @property
    def last_step(self) -> int:
        """The last step that was made and logged; 0 for an empty log."""
        return max((line["step"] for kind, lines in self.lines.items() if kind != "bad" for line in lines), default=0)

    def names(self, kind: str) -> list[str]:
        """The numbers that lines of a kind have, in their order."""
        names: dict[str, None] = {}
        for line in self.lines.get(kind, []):
            names.update(dict.fromkeys(name for name in line if name not in ("kind", "step")))
        return list(names)

    def losses(self) -> list[str]:
        """The names of the training losses: `loss` and its parts."""
        return [name for name in self.names("train") if name not in NOT_A_LOSS]

    def curve(self, name: str, kind: str = "train") -> Curve:
        """A number over steps; empty when it was never logged."""
        points = [(line["step"], line[name]) for line in self.lines.get(kind, []) if name in line]
        values = tuple(math.nan if value is None else float(value) for _, value in points)
        return Curve(name, tuple(step for step, _ in points), values)

    def minutes(self, steps: Sequence[int], clock: str = "seconds_per_step") -> list[float]:
        """The minutes of optimizer steps, without validations, that the training had taken at each of `steps`.

        clock: seconds_per_step, or cpu_seconds_per_step for the processor time of all threads.
        """
        ends, spent, total, before = [0], [0.0], 0.0, 0
        for line in self.lines.get("train", []):
            total += (line.get(clock) or 0.0) * (line["step"] - before) / 60
            before = line["step"]
            ends.append(before)
            spent.append(total)
        return [_interpolate(step, ends, spent) for step in steps]


def read_log(folder: Path) -> RunLog:
    """The log of a run directory. Raises UserError when nothing has been logged there."""
    log = RunLog.read(folder)
    if not log.last_step:
        raise UserError(
            f"{folder} has no {METRICS} with lines of a training. Give the directory of a run, such as runs/NAME, that "
            "has reached its first report (train.log_every steps)."
        )
    return log


def interpolated(curve: Curve, step: float) -> float:
    """The value of a curve between its points, that of the nearest end beyond them."""
    return _interpolate(step, curve.steps, curve.values)


def _interpolate(x: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Piecewise linear; constant beyond the ends. `places` ascend."""
    for (left, low), (right, high) in zip(
        zip(places, values, strict=True), zip(places[1:], values[1:], strict=True), strict=False
    ):
        if left <= x <= right and right > left:
            return low + (high - low) * (x - left) / (right - left)
    return values[0] if x < places[0] else values[-1]


def _of_task(line: dict[str, Any], task: str) -> dict[str, Any]:
    """What a line of a joint run says of a task, under the names of a run of its own."""
    prefix = f"{task}/"
    own = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    # The total loss and the share of unconditional samples are of all tasks together.
    whole = {name: value for name, value in line.items() if "/" not in name and name not in ("loss", "unconditional")}
    return whole | own


def _texts(path: Path) -> list[str]:
    """The lines of a file, if it exists; bytes that are no text stand where a crash has left a line unwritten."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _parse(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("kind"), str):
        return None
    return line
