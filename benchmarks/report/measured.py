"""Evaluations read back from disk: scores with their manifest, the cost of the run, and its sheet of samples.

An evaluation is a RUN/evaluation/*/metrics.json, a file with the same content (benchmarks/results/*.json) or, for a run
that was never evaluated, the scores.json written at the end of its training. Whatever the files do not record is None.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossflow.core.errors import UserError
from crossflow.core.sampling import count_evaluations
from crossflow.core.settings import read
from crossflow.core.solvers import SOLVERS
from crossflow.core.storage import weight_shapes

PARTS = {"backbone": "flow", "source_encoder": "source encoder", "condition_encoder": "condition encoder"}
"""Parts of a model by the first word of their parameters' names."""


@dataclass(frozen=True)
class Cost:
    """What a run costs; None where its files do not say."""

    parameters: Mapping[str, int] | None = None
    """Number of parameters by part: the flow and each encoder."""
    train_seconds: float | None = None
    evaluations: int | None = None
    """Network evaluations per item; a guided step takes two."""
    seconds_per_item: float | None = None
    """On the machine of the evaluation, scoring included."""


@dataclass(frozen=True)
class Measured:
    """One evaluation of one run."""

    name: str
    task: str
    path: Path
    """The file with the scores and the manifest."""
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = Cost()
    pictures: Path | None = None
    """A sheet of samples."""
    run: Path | None = None
    """The run directory, where it is known."""

    @property
    def protocol(self) -> str | None:
        """Name of the protocol, None for an evaluation by the task's own rules."""
        protocol = self.manifest.get("protocol")
        name = protocol.get("name") if isinstance(protocol, Mapping) else protocol
        return name if isinstance(name, str) else None

    @property
    def data(self) -> str | None:
        """SPEC of the data."""
        return self._of_data("spec")

    @property
    def split(self) -> str | None:
        """Split of the data."""
        return self._of_data("split")

    @property
    def num_items(self) -> int | None:
        """Number of scored items."""
        number = self.manifest.get("num_items", self.scores.get("num_items"))
        return None if number is None else int(number)

    def _of_data(self, key: str) -> str | None:
        data = self.manifest.get("data")
        return str(data[key]) if isinstance(data, Mapping) and data.get(key) else None


def find(places: Sequence[Path]) -> tuple[list[Measured], list[str]]:
    """Every evaluation in `places`, and one message for each file that could not be read.

    places: run directories, folders of them, evaluation folders, or JSON files. Raises UserError for a missing place.
    """
    rows: dict[Path, Measured] = {}
    problems: list[str] = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place} does not exist. Give run directories, folders of evaluations, or JSON files.")
        files = [place] if place.is_file() else _files(place)
        if not files:
            problems.append(f"{place}: no evaluation; make one with crossflow evaluate --checkpoint {place}")
        for path in files:
            try:
                rows[path.resolve()] = _read(path)
            except (ValueError, KeyError, TypeError, AttributeError, OSError, UserError) as error:
                problems.append(f"{path}: {_problem(error)}")
    return list(rows.values()), problems


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return " ".join(str(error).split())


def _files(folder: Path) -> list[Path]:
    """metrics.json files below `folder`, scores.json of runs without one, and loose JSON files with scores."""
    metrics = sorted(folder.rglob("metrics.json"))
    evaluated = {run for path in metrics if (run := _run_of(path)) is not None}
    only_trained = [
        path
        for path in sorted(folder.rglob("scores.json"))
        if (path.parent / "config.yaml").is_file() and path.parent not in evaluated
    ]
    loose = [path for path in sorted(folder.glob("*.json")) if path.name != "metrics.json" and _has_scores(path)]
    return [*metrics, *(path for path in only_trained if path not in loose), *loose]


def _has_scores(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"scores", "manifest"} <= content.keys()


def _run_of(path: Path) -> Path | None:
    """The run directory that contains an evaluation."""
    return next((folder for folder in list(path.parents)[:3] if (folder / "config.yaml").is_file()), None)


def _read(path: Path) -> Measured:
    content = json.loads(path.read_text(encoding="utf-8"))
    run = _run_of(path)
    manifest = dict(content.get("manifest") or {})
    if run is None and manifest.get("checkpoint") and (Path(manifest["checkpoint"]) / "config.yaml").is_file():
        run = Path(manifest["checkpoint"])
    if "manifest" not in content and run is not None:
        manifest = _manifest_of_training(run)
    if "scored_on" in content:  # the manifest then is that of the training
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
    """RUN (EVALUATION) for an evaluation inside a run directory."""
    if run is not None and run in path.parents:
        return run.name if path.parent == run else f"{run.name} ({path.parent.name})"
    return path.parent.name if path.name == "metrics.json" else path.stem


def _manifest_of_training(run: Path) -> dict[str, Any]:
    """A manifest for the scores at the end of a training, from the run's own manifest and configuration."""
    settings = read(run)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    data = settings["data"]
    return {
        **manifest,
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


def evaluations(sample: Mapping[str, Any] | None) -> int | None:
    """Network evaluations per item under recorded `sample` settings; None if adaptive or not recorded.

    They are counted from the settings, as manifests of older evaluations left guidance out.

    >>> evaluations({"solver": "heun", "steps": 5, "guidance": 2.0})
    20
    """
    if not sample or not sample.get("steps") or sample.get("solver") not in SOLVERS.names():
        return None
    low, high = sample.get("guidance_interval", (0.0, 1.0))
    return count_evaluations(
        solver=sample["solver"],
        steps=int(sample["steps"]),
        guidance=float(sample.get("guidance", 1.0)),
        guidance_interval=(float(low), float(high)),
        zero_init=int(sample.get("zero_init", 0)),
        time_grid=sample.get("time_grid", "uniform"),
    )


def parameters(run: Path) -> dict[str, int] | None:
    """Number of parameters by part, from the header of the run's weights; None without weights.

    Raises DamagedFile.
    """
    path = next((run / name for name in ("model.safetensors", "ema.safetensors") if (run / name).is_file()), None)
    if path is None:
        return None
    counts: dict[str, int] = {}
    for name, shape in weight_shapes(path).items():
        part = PARTS.get(name.partition(".")[0], "other")
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def train_seconds(run: Path) -> float | None:
    """Seconds spent in training steps: preparation, validation and samples excluded. None without a record."""
    total, before = 0.0, 0
    for record in _history(run):
        if record.get("kind") == "train" and record.get("seconds_per_step") is not None:
            total += record["seconds_per_step"] * (record["step"] - before)
            before = record["step"]
    return total if before else None


CURVES = {
    ("train", "flow"): "training",
    ("val", "flow"): "held out",
    ("val", "flow_shuffled"): "held out, shuffled sources",
}
"""Names of the loss curves by kind of record and loss."""


def flow_losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, flow loss) by curve: in training, on held-out items, and there with the sources shuffled."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES.values()}
    for record in _history(run):
        for (kind, loss), name in CURVES.items():
            if record.get("kind") == kind and record.get(loss) is not None:
                curves[name].append((record["step"], record[loss]))
    return {name: points for name, points in curves.items() if points}


def _history(run: Path) -> list[dict[str, Any]]:
    """The trainer's records (metrics.jsonl); empty without the file."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
