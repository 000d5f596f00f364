"""Which recipe learns fastest: trainings of equal time, scored at intervals, drawn against minutes.

A recipe's number of steps is what fits into the time at the speed of its first steps on this machine, so its schedule
ends with the time. Curves are over the measured minutes of the steps, without preparations, validations and scores.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from crossflow.benchmarks.ablation.results import better
from crossflow.benchmarks.estimate import Estimate
from crossflow.benchmarks.report import page
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.lock import FolderLock
from crossflow.core.output import record
from crossflow.core.progress import TrainingProgress
from crossflow.engine.curves import read_panels, save_chart
from crossflow.engine.folder import RunFolder
from crossflow.engine.provenance import environment
from crossflow.engine.run_log import read_log
from crossflow.engine.train import dry_run, train
from crossflow.tasks import load_config, task_class

RESULTS, CHART, PLAN = "learning.json", "learning.png", "plan.json"
Clock = Literal["minutes", "cpu minutes"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A recipe by its label, with the settings that differ from it."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What all trainings share."""

    minutes: float
    """Of optimizer steps."""
    clock: Clock = "minutes"
    """minutes: by the clock, fair on an idle machine; cpu minutes: of all threads, fair on a shared one."""
    num_points: int = 4
    """Scores during a training, the last of them at its end."""
    num_items: int = 240
    """Items of each score."""
    seeds: tuple[int, ...] = (0,)


def entries(arguments: Sequence[str]) -> list[Entry]:
    """Recipes with their settings from arguments RECIPE, LABEL:RECIPE, KEY=VALUE (all) and LABEL:KEY=VALUE (one).

    Raises UserError without a recipe, for a label used twice, and for settings of an unknown label.
    """
    recipes: dict[str, str] = {}
    settings: list[tuple[str | None, str]] = []
    for argument in arguments:
        label, colon, rest = argument.partition("=")[0].partition(":")
        if PureWindowsPath(argument).is_absolute():  # C:\mine.yaml has no label
            label, colon, rest = argument, "", ""
        if "=" in argument:
            settings.append((label, argument.partition(":")[2]) if colon else (None, argument))
        elif label in recipes:
            raise UserError(f"The label {label} is used twice. Name the second one differently: OTHER:{rest or label}.")
        else:
            recipes[label] = rest or label
    if not recipes:
        raise UserError("Name at least one recipe, such as t2i_tiny (`crossflow list configs`).")
    if unknown := [label for label, _ in settings if label is not None and label not in recipes]:
        raise UserError(f"{unknown[0]} is not among the recipes, which are {', '.join(recipes)}.")
    return [
        Entry(label, recipe, tuple(setting for owner, setting in settings if owner in (None, label)))
        for label, recipe in recipes.items()
    ]


def compare(
    chosen: Sequence[Entry], budget: Budget, folder: Path, say: Say, progress: TrainingProgress | None = None
) -> tuple[Path, Path]:
    """Trains every entry with every seed, continuing what the folder holds; returns the pages, rewritten after each.

    Raises UserError for invalid settings, recipes of several tasks, and a folder with another comparison.
    """
    configs = {entry.label: load_config(entry.recipe, entry.overrides) for entry in chosen}
    if len(tasks := {config.task for config in configs.values()}) > 1:
        raise UserError(f"Recipes of one task can be compared, not of {', '.join(sorted(tasks))}.")
    with FolderLock(folder):
        steps = _keep_plan(chosen, budget, folder, configs, say)
        for seed in budget.seeds:
            for entry in chosen:
                say(f"{entry.label}, seed {seed}: {steps[entry.label]} steps.")
                config = _config(entry, budget, steps[entry.label], seed)
                train(config, run_folder(folder, entry.label, seed), resume="auto", progress=progress)
                pages = write(chosen, budget, folder)
    return pages


def run_folder(folder: Path, label: str, seed: int) -> Path:
    """The run directory of a training."""
    return folder / "runs" / f"{label}-seed{seed}"


def _keep_plan(
    chosen: Sequence[Entry], budget: Budget, folder: Path, configs: dict[str, Config], say: Say
) -> dict[str, int]:
    """The steps of each entry, measured once and kept in the folder; further recipes and seeds may be added."""
    path = folder / PLAN
    fixed = {name: value for name, value in asdict(budget).items() if name != "seeds"}
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {**fixed, "steps": {}}
    if changed := [f"{name} {plan[name]} -> {value}" for name, value in fixed.items() if plan[name] != value]:
        raise UserError(f"{folder} holds a comparison with other settings: {', '.join(changed)}. Use another --output.")
    for entry in chosen:
        if entry.label not in plan["steps"]:
            say(f"Measuring the time per step of {entry.label}.")
            plan["steps"][entry.label] = steps_in(configs[entry.label], entry, budget)
            write_atomically(path, json.dumps(plan, indent=1))
    return {entry.label: plan["steps"][entry.label] for entry in chosen}


def steps_in(config: Config, entry: Entry, budget: Budget) -> int:
    """The optimizer steps of a recipe that fit into the budget on this machine."""
    quick = task_class(config.task).quick  # short preparations, which do not change the speed of the steps
    cost = dry_run(load_config(entry.recipe, (*entry.overrides, *quick)))
    seconds = cost.seconds_per_step if budget.clock == "minutes" else cost.cpu_seconds_per_step
    return max(budget.num_points, round(60 * budget.minutes / seconds))


def _config(entry: Entry, budget: Budget, steps: int, seed: int) -> Config:
    every = math.ceil(steps / budget.num_points)
    schedule = {"steps": steps, "eval_every": every, "eval_scores": "true", "sample_every": 0, "save_every": every}
    overrides = [f"train.{name}={value}" for name, value in schedule.items()]
    return load_config(entry.recipe, (*entry.overrides, *overrides, f"data.num_val={budget.num_items}", f"seed={seed}"))


# -- results


def write(chosen: Sequence[Entry], budget: Budget, folder: Path) -> tuple[Path, Path]:
    """Writes learning.md, learning.html, learning.png and learning.json from the trainings so far."""
    runs = {
        (entry.label, seed): path
        for entry in chosen
        for seed in budget.seeds
        if RunFolder(path := run_folder(folder, entry.label, seed)).read_scores()
    }
    task = task_class(load_config(chosen[0].recipe).task)
    panels = read_panels(list(runs.values()), budget.clock)
    shown = [f"val/{name}" for name in (*task.Scoring.headline, "flow")]
    panels = [panel for panel in panels if panel.name in shown]
    chart = save_chart(panels, folder / CHART, x=budget.clock)
    results = {entry.label: _result(entry, budget, runs) for entry in chosen}
    curves = {panel.name: {label: list(points) for label, points in panel.lines.items()} for panel in panels}
    content = {"budget": asdict(budget), "recipes": results, "curves": curves, **environment()}
    write_atomically(folder / RESULTS, json.dumps(content, indent=1))
    headline = [name for name in task.Scoring.headline if f"val/{name}" in {panel.name for panel in panels}]
    what = "minutes by the clock" if budget.clock == "minutes" else "minutes of processor time, all threads together"
    blocks: list[page.Block] = [
        page.Text(
            f"Each recipe was trained for about {budget.minutes:g} {what}, preparations and scores not counted, with "
            f"seeds {', '.join(map(str, budget.seeds))}; scores on {budget.num_items} items of the validation split. "
            "± is half of the 95 % interval of the mean over seeds (Student's t)."
        ),
        page.Grid(
            ["recipe", "settings", "steps", "minutes", "CPU minutes", *(f"{name}{_arrow(name)}" for name in headline)],
            [_row(entry, results[entry.label], headline) for entry in chosen],
        ),
        page.Picture("curves", chart.read_bytes(), "scores against minutes"),
    ]
    pages = page.write(folder, "learning", f"Learning of {task.name} in equal time", blocks)
    record(folder, {path.name for path in (*pages, chart, folder / RESULTS)})
    return pages


def _result(entry: Entry, budget: Budget, runs: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """Time and final scores of an entry over its finished seeds."""
    folders = [path for (label, _), path in runs.items() if label == entry.label]
    if not folders:
        return {"recipe": entry.recipe, "settings": list(entry.overrides), "seeds": 0}
    logs = [read_log(path) for path in folders]
    scores = [RunFolder(path).read_scores()["scores"] for path in folders]
    steps = logs[0].last_step
    shared = [name for name, value in scores[0].items() if value is not None and all(name in each for each in scores)]
    return {
        "recipe": entry.recipe,
        "settings": list(entry.overrides),
        "seeds": len(folders),
        "steps": steps,
        "minutes": Estimate.of([log.minutes([steps])[0] for log in logs]).mean,
        "cpu_minutes": Estimate.of([log.minutes([steps], "cpu_seconds_per_step")[0] for log in logs]).mean,
        "scores": {name: asdict(Estimate.of([each[name] for each in scores])) for name in shared},
    }


def _row(entry: Entry, result: dict[str, Any], headline: Sequence[str]) -> list[page.Cell]:
    name = entry.label if entry.label == entry.recipe else f"{entry.label} ({entry.recipe})"
    if not result["seeds"]:
        return [name, " ".join(entry.overrides), "-", "-", "-", *("-" for _ in headline)]
    scores = [Estimate(**result["scores"][score]) if score in result["scores"] else "-" for score in headline]
    times = [f"{result[part]:.1f}" for part in ("minutes", "cpu_minutes")]
    return [name, " ".join(entry.overrides), str(result["steps"]), *times, *map(str, scores)]


def _arrow(score: str) -> str:
    return " ↑" if better(score) == "higher" else " ↓"
