"""Distortion and perception of trained runs, over the steps of sampling and the deviation of the source.

One step from the mean of the source is the estimate with the least error, and the smoothest one; more steps and more
noise lead to outputs that look real and lie farther from the truth (Blau and Michaeli 2018). H W height and width.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.benchmarks.evaluation.plan import Plan, plan
from crossflow.benchmarks.report import page
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.sampling import count_evaluations
from crossflow.data.cases import Case, is_picture
from crossflow.engine.sample import Pipeline, load
from crossflow.engine.score import batches

NAME = "perception"
SHARPNESS = "sharpness"
"""Mean gradient of the outputs as a share of that of the truths: below 1 for smooth ones."""
FEATURES = "features"
"""Distance from the truth in the features of a network, see `networks.picture_distances.FeatureDistance`."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What is measured of each run.

    deviations: factors of the deviation of the source, 0 for its mean; num: items of the validation split; distance:
    between pictures (B, 3, H, W) in [-1, 1] -> (B,), None without a network.
    """

    steps: tuple[int, ...]
    deviations: tuple[float, ...]
    num: int
    seed: int = 0
    distance: nn.Module | None = None


@dataclass(frozen=True)
class Row:
    """A run sampled in one way."""

    run: str
    steps: int
    deviation: float
    evaluations: int | None
    scores: dict[str, float]

    @property
    def is_mean(self) -> bool:
        """Whether it estimates the posterior mean: one step without noise."""
        return self.steps == 1 and self.deviation == 0


def perception(runs: Sequence[Path], study: Study, folder: Path, say: Report) -> tuple[Path, Path]:
    """Measures the runs and writes perception.md, .html and .json into `folder`; returns the two pages.

    Raises UserError for tasks whose truths are neither pictures nor depth, and for runs of different tasks.
    """
    rows: list[Row] = []
    tasks: set[str] = set()
    for run in runs:
        pipe = load(run)
        tasks.add(pipe.task.name)
        if len(tasks) > 1:
            raise UserError(f"A page compares runs of one task, and these are {' and '.join(sorted(tasks))} runs.")
        rows += _measured(pipe, _label(run, runs), study, say)
    names = [*pipe.task.Scoring.headline, *(name for name in (SHARPNESS, FEATURES) if name in rows[0].scores)]
    return _write(rows, names, study, folder, pipe.task.name)


def _label(run: Path, runs: Sequence[Path]) -> str:
    """The name of the run's folder, or all of its path where another run's folder has that name."""
    return str(run) if sum(other.name == run.name for other in runs) > 1 else run.name


def _measured(pipe: Pipeline, label: str, study: Study, say: Report) -> Iterator[Row]:
    cases = plan(pipe, None, None, "val", study.num)
    if not _comparable(next(iter(cases.cases)).truth):
        raise UserError(
            f"Outputs of the task {pipe.task.name} have no single truth to be compared with pixel by pixel; this page "
            "is for runs such as super-resolution and depth."
        )
    has_noise = pipe.model.source_encoder.kind != "deterministic"
    for deviation, steps in product(study.deviations if has_noise else (0.0,), study.steps):
        settings = pipe.sample_settings(steps=steps, mode=deviation == 0)
        pipe.deviation = deviation
        scores = measure(pipe, cases, settings, study)
        how = {name: getattr(settings, name) for name in ("solver", "guidance", "guidance_interval", "zero_init")}
        row = Row(label, steps, deviation, count_evaluations(steps=steps, **how), scores)
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        say(f"{label}, steps {steps}, deviation x {deviation:g}: {listed}")
        yield row


def _comparable(truth: object) -> bool:
    return isinstance(truth, np.ndarray) and truth.ndim in (2, 3)


def measure(pipe: Pipeline, cases: Plan, settings: SampleConfig, study: Study) -> dict[str, float]:
    """The headline scores of a run sampled under `settings`, its sharpness, and its distance in features."""
    metric, gradients, distances = cases.scoring.metric(), np.zeros(2), []
    for part in batches(list(cases.cases), settings.batch_size):
        outputs = pipe.outputs([case.input for case in part], [case.id for case in part], study.seed, settings)
        metric.add_all([case.id for case in part], outputs, [case.truth for case in part])
        for case, output in zip(part, outputs, strict=True):
            truth = _fitted(case, output)
            gradients += _gradients(output, truth)
            if study.distance is not None and is_picture(output):
                distances.append(study.distance(_pixels(output), _pixels(truth)).item())
    scores = {name: value for name, value in metric.compute().items() if name in cases.scoring.headline}
    scores[SHARPNESS] = float(gradients[0] / max(gradients[1], 1e-12))
    return scores | ({FEATURES: float(np.mean(distances))} if distances else {})


def _fitted(case: Case, output: np.ndarray) -> np.ndarray:
    """The truth in the form of the output: of its size, from the top left, and with its channels."""
    truth: Any = case.truth[: output.shape[0], : output.shape[1]]
    return np.repeat(truth[..., None], 3, axis=-1) if truth.ndim < output.ndim else truth


def _gradients(output: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The summed differences of neighbours in the output and in the truth; of depth where both are measured."""
    known = truth > 0 if truth.ndim == 2 else np.ones(truth.shape, bool)
    sums = []
    for values in (output.astype(np.float64), truth.astype(np.float64)):
        pairs = [(np.abs(np.diff(values, axis=axis)), _both(known, axis)) for axis in (0, 1)]
        sums.append(sum(float(differences[there].sum()) for differences, there in pairs))
    return sums[0], sums[1]


def _both(known: np.ndarray, axis: int) -> np.ndarray:
    """Where a value and its next neighbour along the axis are known."""
    first, second = (np.take(known, np.arange(start, known.shape[axis] - 1 + start), axis) for start in (0, 1))
    return first & second


def _pixels(picture: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def _write(rows: Sequence[Row], names: Sequence[str], study: Study, folder: Path, task: str) -> tuple[Path, Path]:
    x, y = names[0], FEATURES if FEATURES in names else SHARPNESS
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row.run if row.deviation == 1 else f"{row.run}, deviation x {row.deviation:g}"
        lines.setdefault(name, []).append((row.scores[x], row.scores[y]))
    header = ["run", "steps", "evaluations", "deviation of the source", *names]
    cells = [
        [row.run, str(row.steps), str(row.evaluations or "varies"), f"x {row.deviation:g}"]
        + [f"{row.scores[name]:.4g}" for name in names]
        for row in rows
    ]
    about = (
        f"{study.num} items of the validation split, seed {study.seed}. One step without noise (highlighted) estimates "
        "the mean of all targets that fit an input, which has the least squared error and is the smoothest. Sharpness "
        "is the mean gradient of the outputs as a share of that of the truths."
    )
    blocks: list[page.Block] = [
        page.Text(about),
        page.Grid(header, cells, frozenset(number for number, row in enumerate(rows) if row.is_mean)),
        page.Picture("tradeoff", page.curves(f"{y} against {x}, each line over the steps", lines), f"{y} against {x}"),
    ]
    pages = page.write(folder, NAME, f"Perception and distortion: {task}", blocks)
    content = {"task": task, "num": study.num, "seed": study.seed, "rows": [asdict(row) for row in rows]}
    write_atomically(folder / f"{NAME}.json", json.dumps(content, indent=1))
    return pages
