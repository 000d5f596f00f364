"""A run as a reader sees it: settings that differ from its recipe, size, scores, files, provenance."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.core.config import Config
from crossflow.core.settings import build, flat, read, shipped
from crossflow.core.storage import weight_shapes
from crossflow.core.weights import joint_run, kind_of_weights, of_task, weights_file
from crossflow.engine.folder import METRICS, SAMPLES, SCORES, RunFolder
from crossflow.networks.hub import run_folder
from crossflow.tasks import load_config, task_class

EVALUATIONS = "evaluation"
MISSING = "not set"
"""Stands for a setting that the other side does not have."""


@dataclass(frozen=True)
class Measurement:
    """Scores of a run on some data: of an evaluation, or of the validation after its last step."""

    path: Path
    """metrics.json, or the run's scores.json."""
    title: str
    """Of the protocol; "validation", or "the task's own rules"."""
    data: str
    split: str
    num_items: int | None
    scores: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    headline: Sequence[str]
    """The scores shown first."""

    def leading(self) -> dict[str, float]:
        """The scores of the headline that were measured; all of them without a headline."""
        return {name: self.scores[name] for name in self.headline or self.scores if name in self.scores}


@dataclass(frozen=True)
class Description:
    """What a run directory holds."""

    folder: Path
    config: Config
    recipe: str | None
    """The shipped recipe that it was trained from, or the nearest one of its task; None without any."""
    differences: Mapping[str, tuple[object, object]]
    """Setting -> its value in the recipe and in the run, where they differ."""
    step: int | None
    weights: Path | None
    """The file that sampling reads by default; None before the first checkpoint."""
    num_parameters: Mapping[str, int]
    measurements: Sequence[Measurement]
    curves: Path | None
    samples: Sequence[Path]
    manifest: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Everything but the complete configuration, for scripts."""
        return {
            "folder": str(self.folder),
            "task": self.config.task,
            "recipe": self.recipe,
            "differences": {name: {"recipe": a, "run": b} for name, (a, b) in self.differences.items()},
            "step": self.step,
            "steps": self.config.train.steps,
            "weights": None if self.weights is None else str(self.weights),
            "parameters": dict(self.num_parameters),
            "base": self.config.finetune.base,
            "measurements": [
                {**vars(each), "path": str(each.path), "headline": list(each.headline)} for each in self.measurements
            ],
            "curves": None if self.curves is None else str(self.curves),
            "samples": [str(path) for path in self.samples],
            "manifest": dict(self.manifest),
        }


def describe(source: str | Path) -> Description:
    """Reads a run directory, or a hub repository that holds one. Raises UserError for anything else."""
    folder = run_folder(source)
    run, config = RunFolder(folder), load_config(folder)
    manifest = run.read_manifest()
    recipe, differences = compare_with_recipe(config, manifest.get("command", ()))
    weights = weights_file(folder, kind_of_weights(folder))
    curves = [path for path in (folder / "curves.png", run.root / METRICS) if path.is_file()]
    return Description(
        folder=folder,
        config=config,
        recipe=recipe,
        differences=differences,
        step=run.last_step or run.read_scores().get("step"),
        weights=weights if weights.is_file() else None,
        num_parameters=_num_parameters(weights, folder) if weights.is_file() else {},
        measurements=read_measurements(run, config),
        curves=next(iter(curves), None),
        samples=sorted((folder / SAMPLES).glob("*.png")),
        manifest=manifest,
    )


def compare_with_recipe(
    config: Config, command: Sequence[str] = ()
) -> tuple[str | None, dict[str, tuple[object, object]]]:
    """The shipped recipe that the command names, else the one of the task that differs least, and the differences."""
    own = _settings(config)
    recipes = {}
    for name in shipped():
        settings = read(name)
        if settings.get("task") == config.task:
            recipes[name] = _settings(build(type(config), settings))
    differences = {name: _differences(recipe, own) for name, recipe in recipes.items()}
    options = dict(itertools.pairwise(command))
    named = options.get("--config", f"{options.get('--task')}_tiny")
    nearest = min(differences, key=lambda name: len(differences[name]), default=None)
    recipe = named if named in recipes else nearest
    return recipe, {} if recipe is None else differences[recipe]


def _settings(config: Config) -> dict[str, object]:
    return flat(config.model_dump(mode="json"))


def _differences(recipe: Mapping[str, object], own: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    pairs = {name: (recipe.get(name, MISSING), own.get(name, MISSING)) for name in (*own, *(recipe.keys() - own))}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _num_parameters(weights: Path, folder: Path) -> dict[str, int]:
    """Numbers of values of the tensors by their part of the model; of a joint run those of the task in `folder`."""
    numbers: dict[str, int] = {}
    shapes: Mapping[str, tuple[int, ...]] = weight_shapes(weights)
    shapes = shapes if joint_run(folder) is None else of_task(shapes, folder.absolute().name)
    for name, shape in shapes.items():
        part = name.partition(".")[0].replace("_", " ")
        numbers[part] = numbers.get(part, 0) + math.prod(shape)
    return numbers


def read_measurements(run: RunFolder, config: Config) -> list[Measurement]:
    """The scores of the validation after the last step, then those of the evaluations in the run directory."""
    headline = task_class(config.task).Scoring.headline
    measurements = []
    if content := run.read_scores():
        data = config.data.val or config.data.train
        measurements.append(_measurement(run.path / SCORES, content, "validation", (data, "val"), headline))
    for path in sorted(run.path.glob(f"{EVALUATIONS}/*/metrics.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            manifest = content["manifest"]
            where, protocol = (manifest["data"]["spec"], manifest["data"]["split"]), manifest.get("protocol") or {}
            title = protocol.get("title", "the task's own rules")
            measurements.append(_measurement(path, content, title, where, protocol.get("headline") or headline))
        except (OSError, ValueError, KeyError, TypeError):  # unfinished, or of another program
            continue
    return measurements


def _measurement(
    path: Path, content: Mapping[str, Any], title: str, where: tuple[str, str], headline: Sequence[str]
) -> Measurement:
    scores = {name: float(value) for name, value in content["scores"].items() if value is not None}
    num_items = scores.pop("num_items", None)
    return Measurement(
        path=path,
        title=title,
        data=where[0],
        split=where[1],
        num_items=None if num_items is None else int(num_items),
        scores=scores,
        intervals=content.get("intervals", {}),
        headline=headline,
    )
