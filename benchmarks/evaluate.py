"""One run on one split -> metrics.json with its manifest, one row per item, and a page of pictures."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.report import write_page
from crossflow.core.config import SampleConfig, build
from crossflow.tasks.pipeline import Pipeline
from crossflow.tasks.run import environment, write_atomically
from crossflow.tasks.scoring import Progress, Scores, score


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
) -> Report:
    """Scores `pipe` on at most `num` items of a split; spec: the data of the run's own validation when None.

    Writes metrics.json (scores, intervals, trivial baseline, manifest), items.jsonl and index.html to `folder`, by
    default RUN/evaluation/DATA-SPLIT-STEPS. Raises UserError when the data do not fit the task.
    """
    chosen = build(SampleConfig, {**pipe.settings.model_dump(), **(settings or {})})
    task = pipe.task
    examples = task.dataset(split, spec, limit=num)
    cases = task.cases(examples, num)
    begun = time.monotonic()
    scores = score(pipe, cases, seed=seed, settings=chosen, num_tiles=24, thorough=True, progress=progress)
    seconds = time.monotonic() - begun
    train = task.dataset("train")
    baseline = task.baseline(train, cases)
    place = examples.reader.spec.rpartition("/")[2].replace(":", "-")
    name = f"{place}-{examples.reader.split}-{chosen.solver}{chosen.steps}"
    target = folder or (pipe.folder or Path("outputs")) / "evaluation" / name
    target.mkdir(parents=True, exist_ok=True)
    manifest = {
        "task": task.name,
        "checkpoint": str(pipe.folder),
        "weights": pipe.weights,
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
