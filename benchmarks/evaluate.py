"""One run on one split -> metrics.json with its manifest, one row per item, and a page of pictures."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.report import write_page
from crossflow.core import distributed
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.tasks.common.dataset import Examples
from crossflow.tasks.pipeline import Pipeline
from crossflow.tasks.run import environment, write_atomically
from crossflow.tasks.scoring import Progress, Scores, score_shared, seen_in_training


@dataclass(frozen=True)
class Report:
    folder: Path
    scores: Scores
    baseline: dict[str, float]


def evaluate(
    pipe: Pipeline,
    *,
    spec: str | None = None,
    split: str = "test",
    num: int = 1000,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Scores `pipe` on at most `num` items of a split; spec: the data of the run's own validation when None.

    Several processes share the items; the first one writes and gets the report, the others get None.

    Writes metrics.json (scores, intervals, trivial baseline, manifest), items.jsonl and index.html to `folder`, by
    default RUN/evaluation/DATA-SPLIT-SOLVER and whatever differs from the recipe. Raises UserError when the data do
    not fit the task.
    """
    chosen = pipe.sample_settings(**(settings or {}))
    task = pipe.task
    examples = task.dataset(split, spec, limit=num)
    cases = task.cases(examples, num)
    begun = time.monotonic()
    scores = score_shared(pipe, cases, seed=seed, settings=chosen, num_tiles=24, thorough=True, progress=progress)
    seconds = time.monotonic() - begun
    if scores is None:
        return None
    baseline: dict[str, float] = {}
    try:
        train = task.dataset("train")
        baseline = task.baseline(train, cases)
        scores.notes.extend(seen_in_training(train, examples))
    except UserError as error:  # a run is complete without its training data, and scores are not thrown away for them
        scores.notes.append(f"no trivial baseline, which is made from the training data: {error}")
    target = folder or (pipe.folder or Path("outputs")) / "evaluation" / _label(pipe, examples, chosen, seed)
    target.mkdir(parents=True, exist_ok=True)
    manifest = {
        "task": task.name,
        "checkpoint": str(pipe.folder),
        "weights": pipe.weights,
        "guided_by": pipe.guided_by,
        "data": {
            "spec": examples.reader.spec,
            "split": examples.reader.split,
            "fingerprint": examples.reader.fingerprint(),
        },
        "num_items": len(cases),
        "bad_items": examples.bad,
        "image_size": task.config.data.image_size,
        "sample": chosen.model_dump(mode="json"),
        "seed": seed,
        "seconds": round(seconds, 2),
        "processes": distributed.world_size(),
        **environment(),
    }
    content = {
        "scores": scores.values,
        "intervals": scores.intervals,
        "baseline": baseline,
        "notes": scores.notes,
        "manifest": manifest,
    }
    write_atomically(target / "metrics.json", json.dumps(content, indent=1, ensure_ascii=False))
    write_atomically(target / "items.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows))
    write_page(target, f"{task.name} on {examples.reader.spec} ({examples.reader.split})", content, scores.pages)
    return Report(target, scores, baseline)


def _label(pipe: Pipeline, examples: Examples, chosen: SampleConfig, seed: int) -> str:
    """The name of an evaluation's folder, so that one with other settings does not take the place of this one."""
    place = examples.reader.spec.rstrip("/").rpartition("/")[2].replace(":", "-")
    usual = {"solver": chosen.solver, "steps": chosen.steps, "batch_size": chosen.batch_size}
    recipe = {**pipe.settings.model_dump(mode="json"), **usual}
    other = {name: value for name, value in chosen.model_dump(mode="json").items() if value != recipe[name]}
    other |= {"seed": seed} if seed else {}
    words = [f"{name}{value}".replace(" ", "") for name, value in other.items()]
    words += [pipe.weights] * (pipe.weights != "ema") + ["autoguided"] * (pipe.weak is not None)
    return "-".join([place, examples.reader.split, f"{chosen.solver}{chosen.steps}", *words])
