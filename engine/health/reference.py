"""Reference bands: what healthy runs of a recipe logged and scored, in configs/references/RECIPE.json.

A band is measured from runs by `crossflow doctor RUN... --save-reference FILE`: at each logged step the lowest, median
and highest value of the runs there and at the neighbouring steps, which stand in for the scatter of runs that were not
made. `num_runs` and `steps` say how much that is worth; runs that have not ended give a shorter band without scores.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossflow.core.config import Config, Section
from crossflow.core.errors import UserError
from crossflow.core.recipes import RECIPES
from crossflow.core.settings import build, flat
from crossflow.engine.folder import RunFolder
from crossflow.engine.health.posterior import PosteriorNumbers
from crossflow.engine.run_log import CLOCK, Curve, RunLog, interpolated, read_log
from crossflow.tasks import load_config

FOLDER = RECIPES / "references"
FREE = ("train.", "sample.", "seed", "guidance.", "loss.", "data.val", "data.num_")
"""Settings, by how their names begin, that may differ from a recipe's for its band still to be meaningful: where they
take a run out of the band, that is what is to be reported.
"""
NOT_COMPARED = (
    *("seed", "sample.", "train.num_workers", "train.compile", "train.trackers", "train.max_minutes", "train.keep"),
    *("train.max_bad_steps", "train.grace_seconds", "train.auto_micro_batch"),
    *("train.save_every", "train.eval_every", "train.eval_scores", "train.sample_every", "train.log_every"),
)
"""Settings that do not change what is learned, or that should not."""


class Band(Section):
    """Lowest, median and highest value at each step."""

    steps: tuple[int, ...]
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float, float]:
        """(low, median, high) at a step, interpolated."""
        low, median, high = (
            interpolated(Curve("", self.steps, values), step) for values in (self.low, self.median, self.high)
        )
        return low, median, high


class ScoreBand(Section):
    """A score of the reference runs: the widest of their 95 % intervals, and what the trivial baseline scores."""

    low: float
    high: float
    baseline: float | None = None


class Reference(Section):
    """What healthy runs of a recipe logged and scored."""

    recipe: str
    num_runs: int
    steps: int
    """To which the bands reach."""
    settings: dict[str, Any]
    """Those of the runs, by dotted name."""
    train: dict[str, Band]
    val: dict[str, Band]
    scores: dict[str, ScoreBand]
    posterior: dict[str, float]
    """Numbers of the posteriors on validation items, averaged over the runs."""

    def differences(self, config: Config) -> dict[str, str]:
        """Setting -> `VALUE (recipe: VALUE)` for what a run does otherwise, as far as it can change what is learned."""
        own = flat(config.model_dump(mode="json"))
        return {
            name: f"{own.get(name)} (recipe: {value})"
            for name, value in self.settings.items()
            if name in own and own[name] != value and not name.startswith(NOT_COMPARED)
        }

    def fits(self, config: Config) -> bool:
        """Whether the bands can be held against a run: it has the recipe's data, model, path and sizes."""
        return all(name.startswith(FREE) for name in self.differences(config))


def read_references(folder: Path = FOLDER) -> list[Reference]:
    """The references in a folder, by recipe. Raises UserError for a file that is none."""
    return [read_reference(path) for path in sorted(folder.glob("*.json"))]


def read_reference(path: Path) -> Reference:
    """The reference in a file. Raises UserError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The reference {path} cannot be read: {error}. Measure it again.") from error
    return build(Reference, content)


def nearest(config: Config, references: Sequence[Reference]) -> Reference | None:
    """The reference of a run's task whose settings differ least from the run's; None without any of the task."""
    same_task = [reference for reference in references if reference.settings.get("task") == config.task]
    return min(same_task, key=lambda reference: len(reference.differences(config)), default=None)


def measure_reference(
    recipe: str, folders: Sequence[Path], posteriors: Sequence[PosteriorNumbers | None] = ()
) -> Reference:
    """The reference from runs of a recipe. Raises UserError for runs that differ in their settings or have no log."""
    configs, logs = [load_config(folder) for folder in folders], [read_log(folder) for folder in folders]
    settings = {
        name: value
        for name, value in flat(configs[0].model_dump(mode="json")).items()
        if not name.startswith(NOT_COMPARED)
    }
    reference = Reference(
        recipe=recipe,
        num_runs=len(folders),
        steps=min(log.last_step for log in logs),
        settings=settings,
        train={},
        val={},
        scores=_scores([RunFolder(folder) for folder in folders]),
        posterior=_averages([vars(numbers) for numbers in posteriors if numbers is not None]),
    )
    for folder, config in zip(folders, configs, strict=True):
        if different := reference.differences(config):
            raise UserError(f"{folder} has other settings than {folders[0]}: {', '.join(different)}. Give runs alike.")
    bands = {kind: _bands(logs, kind) for kind in ("train", "val")}
    return reference.model_copy(update=bands)


def _scores(runs: Sequence[RunFolder]) -> dict[str, ScoreBand]:
    contents = [run.read_scores() for run in runs]
    if not all(contents):
        return {}
    bands = {}
    for name in contents[0]["intervals"]:
        intervals = [content["intervals"][name] for content in contents if name in content["intervals"]]
        baseline = contents[0]["baseline"].get(name)
        bands[name] = ScoreBand(
            low=min(low for low, _ in intervals), high=max(high for _, high in intervals), baseline=baseline
        )
    return bands


def _bands(logs: Sequence[RunLog], kind: str) -> dict[str, Band]:
    bands = {}
    for name in logs[0].names(kind):
        curves = [log.curve(name, kind) for log in logs]
        if name in CLOCK or name in ("epoch", "lr") or not all(curve.values and curve.finite for curve in curves):
            continue
        steps = curves[0].steps
        near = [steps[max(0, i - 1) : i + 2] for i in range(len(steps))]
        values = [[interpolated(curve, step) for curve in curves for step in around] for around in near]
        middle = [statistics.median(interpolated(curve, step) for curve in curves) for step in steps]
        bands[name] = Band(
            steps=steps,
            low=tuple(_rounded(min(some)) for some in values),
            median=tuple(map(_rounded, middle)),
            high=tuple(_rounded(max(some)) for some in values),
        )
    return bands


def _averages(numbers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not numbers:
        return {}
    names = [name for name, value in numbers[0].items() if isinstance(value, float)]
    return {name: _rounded(statistics.fmean(each[name] for each in numbers)) for name in names}


def _rounded(value: float) -> float:
    """Five digits: a band is no more exact than that, and the files stay readable."""
    return float(f"{value:.5g}")
