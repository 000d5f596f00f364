"""What evaluations have left on disk, read back: scores with their manifest, what the run cost, and its pictures.

A row comes from RUN/evaluation/*/metrics.json, from a file of the same content (benchmarks/results/*.json), or, for a
run that was never evaluated, from the scores.json of the end of its training. What is not on disk is None.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossflow.core.errors import UserError
from crossflow.core.settings import read

PARTS = {"backbone": "flow", "source_encoder": "source encoder", "condition_encoder": "condition encoder"}
PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}
"""Evaluations of the velocity in a step of each solver; ab2 has one more in its first."""


@dataclass(frozen=True)
class Cost:
    """What a run takes; None is what its folder does not tell."""

    parameters: Mapping[str, int] | None = None
    """Of the flow and of the encoders apart."""
    train_seconds: float | None = None
    evaluations: int | None = None
    """Of the network for one item; guidance counts twice."""
    seconds_per_item: float | None = None
    """On the machine of the evaluation, scoring included."""


@dataclass(frozen=True)
class Measured:
    name: str
    task: str
    path: Path
    """The file that holds scores and manifest."""
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = Cost()
    pictures: Path | None = None
    """A sheet of samples."""
    run: Path | None = None
    """Its run directory, where that is known."""

    @property
    def protocol(self) -> str | None:
        """The named protocol by which it was measured, if it was by one."""
        given = self.manifest.get("protocol")
        given = given.get("name") if isinstance(given, Mapping) else given
        return given if isinstance(given, str) else None

    @property
    def data(self) -> str | None:
        """SPEC of what it was measured on."""
        about = self.manifest.get("data")
        return str(about["spec"]) if isinstance(about, Mapping) and about.get("spec") else None

    @property
    def split(self) -> str | None:
        about = self.manifest.get("data")
        return str(about["split"]) if isinstance(about, Mapping) and about.get("split") else None

    @property
    def num_items(self) -> int | None:
        number = self.manifest.get("num_items", self.scores.get("num_items"))
        return None if number is None else int(number)


def find(places: list[Path]) -> tuple[list[Measured], list[str]]:
    """Every evaluation in `places` (run directories, folders of them, evaluation folders, JSON files), and what was
    found and could not be read. Raises UserError for a place that is not there.
    """
    rows: dict[Path, Measured] = {}
    problems: list[str] = []
    for place in places:
        if not place.exists():
            raise UserError(f"There is no {place}. Give run directories, folders of evaluations, or their JSON files.")
        found = [place] if place.is_file() else _files(place)
        if not found:
            problems.append(f"{place}: no evaluation; make one with crossflow evaluate --checkpoint {place}")
        for path in found:
            try:
                rows[path.resolve()] = _read(path)
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                problems.append(f"{path}: {_words(error)}")
    return list(rows.values()), problems


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return " ".join(str(error).split())


def _files(folder: Path) -> list[Path]:
    """metrics.json files below, scores.json of runs without any, and loose JSON files that hold scores."""
    metrics = sorted(folder.rglob("metrics.json"))
    evaluated = {run for path in metrics if (run := _run_of(path)) is not None}
    ended = [
        path
        for path in sorted(folder.rglob("scores.json"))
        if (path.parent / "config.yaml").is_file() and path.parent not in evaluated
    ]
    loose = [path for path in sorted(folder.glob("*.json")) if path.name != "metrics.json" and _holds_scores(path)]
    return [*metrics, *(path for path in ended if path not in loose), *loose]


def _holds_scores(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"scores", "manifest"} <= content.keys()


def _run_of(path: Path) -> Path | None:
    """The run directory that an evaluation lies in."""
    return next((folder for folder in list(path.parents)[:3] if (folder / "config.yaml").is_file()), None)


def _read(path: Path) -> Measured:
    content = json.loads(path.read_text(encoding="utf-8"))
    run = _run_of(path)
    manifest = dict(content.get("manifest") or {})
    if run is None and manifest.get("checkpoint") and (Path(manifest["checkpoint"]) / "config.yaml").is_file():
        run = Path(manifest["checkpoint"])
    if "manifest" not in content and run is not None:
        manifest = _ended(run)
    if "scored_on" in content:  # the manifest is then that of the training
        manifest["data"] = {**manifest["data"], "split": content["scored_on"]}
    scores = {name: float(value) for name, value in content["scores"].items() if value is not None}
    intervals = {name: (float(low), float(high)) for name, (low, high) in (content.get("intervals") or {}).items()}
    pictures = [path.parent / "pictures.png", *([run / "samples" / "final.png"] if run is not None else [])]
    return Measured(
        name=_name(path, run),
        task=str(manifest["task"]),
        path=path,
        scores={name: value for name, value in scores.items() if math.isfinite(value)},
        intervals=intervals,
        baseline={name: float(value) for name, value in (content.get("baseline") or {}).items()},
        manifest=manifest,
        cost=_cost(run, manifest, scores, content.get("train_minutes")),
        pictures=next((picture for picture in pictures if picture.is_file()), None),
        run=run,
    )


def _name(path: Path, run: Path | None) -> str:
    """RUN (EVALUATION), for one in the run's folder."""
    if run is not None and run in path.parents:
        return run.name if path.parent == run else f"{run.name} ({path.parent.name})"
    return path.parent.name if path.name == "metrics.json" else path.stem


def _ended(run: Path) -> dict[str, Any]:
    """A manifest for the scores at the end of training, from the run's own manifest and configuration."""
    settings = read(run)
    begun = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    data = settings["data"]
    return {
        **begun,
        "data": {"spec": data.get("val") or data["train"], "split": "val"},
        "image_size": data["image_size"],
        "sample": settings["sample"],
        "seed": settings["seed"],
    }


def _cost(run: Path | None, manifest: Mapping[str, Any], scores: Mapping[str, float], minutes: float | None) -> Cost:
    seconds = None if minutes is None else 60.0 * minutes
    items = manifest.get("num_items", scores.get("num_items"))
    return Cost(
        parameters=None if run is None else parameters(run),
        train_seconds=seconds if run is None or seconds is not None else train_seconds(run),
        evaluations=evaluations(manifest.get("sample")),
        seconds_per_item=manifest["seconds"] / items if manifest.get("seconds") and items else None,
    )


def parameters(run: Path) -> dict[str, int] | None:
    """Parameters of the flow and of the encoders, from the header of the run's weights; None without weights."""
    from safetensors import SafetensorError, safe_open

    path = next((run / name for name in ("model.safetensors", "ema.safetensors") if (run / name).is_file()), None)
    if path is None:
        return None
    counts: dict[str, int] = {}
    try:
        with safe_open(path, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                part = PARTS.get(name.partition(".")[0], "other")
                counts[part] = counts.get(part, 0) + math.prod(weights.get_slice(name).get_shape())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    return counts


def train_seconds(run: Path) -> float | None:
    """Time of the training steps alone: without validation, samples and what comes before."""
    total, before = 0.0, 0
    for numbers in _history(run):
        if numbers.get("kind") == "train" and numbers.get("seconds_per_step") is not None:
            total += numbers["seconds_per_step"] * (numbers["step"] - before)
            before = numbers["step"]
    return total if before else None


def flow_losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, flow loss) of a run in training, on held-out items, and there with the sources of other items."""
    found: dict[str, list[tuple[int, float]]] = {"training": [], "held out": [], "held out, shuffled sources": []}
    named = {("train", "flow"): "training", ("val", "flow"): "held out"}
    named[("val", "flow_shuffled")] = "held out, shuffled sources"
    for numbers in _history(run):
        for (kind, name), curve in named.items():
            if numbers.get("kind") == kind and numbers.get(name) is not None:
                found[curve].append((numbers["step"], numbers[name]))
    return {name: curve for name, curve in found.items() if curve}


def _history(run: Path) -> list[dict[str, Any]]:
    """What the trainer wrote down on the way (metrics.jsonl); nothing where there is no such file."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def evaluations(sample: Mapping[str, Any] | None) -> int | None:
    """Network evaluations for one item under `sample` settings; None for an adaptive solver, or when not told."""
    if not sample or sample.get("solver") not in PER_STEP or not sample.get("steps"):
        return None
    solver, steps = sample["solver"], int(sample["steps"])
    times = steps * PER_STEP[solver] + (solver == "ab2")
    return times * (2 if sample.get("guidance", 1) != 1 else 1)
