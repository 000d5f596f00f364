"""How fast this machine renders scenes, trains recipes, reads cached features, and samples from the papers' models."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossflow.benchmarks.speed.reading import NUM_ROWS, reading_speed
from crossflow.benchmarks.speed.rendering import PROCESSES, SIZES, rendering_speed
from crossflow.benchmarks.speed.sampling import RECIPES, sampling_speed
from crossflow.engine.provenance import environment
from crossflow.engine.train import dry_run
from crossflow.tasks import load_config, task_class

PARTS = ("scenes", "training", "cache", "sampling")
DEFAULT_PARTS = PARTS[:3]
"""Sampling is not among them: models of a billion parameters are too large for many machines."""


def measure(
    recipes: Sequence[str],
    folder: Path,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    sampled: Sequence[str] = RECIPES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Rows of measurements by part, with the machine that they belong to.

    recipes: timed in training; folder: for temporary files; sampled: recipes timed in sampling; progress(done, total):
    called after each row.
    """
    num_rows = {
        "scenes": len(SIZES) * len(PROCESSES),
        "training": len(recipes),
        "cache": NUM_ROWS,
        "sampling": 2 * len(sampled),
    }
    counter, total = itertools.count(1), sum(num_rows[part] for part in parts)

    def on_row() -> None:
        progress(next(counter), total)

    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "scenes": lambda: rendering_speed(on_row=on_row),
        "training": lambda: training_speed(recipes, on_row=on_row),
        "cache": lambda: reading_speed(folder / "reading", on_row=on_row),
        "sampling": lambda: sampling_speed(sampled, on_row=on_row),
    }
    return {**{part: measures[part]() for part in PARTS if part in parts}, **environment()}


def training_speed(
    recipes: Sequence[str], overrides: Sequence[str] = (), on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Seconds per training step of each recipe, by dry runs that leave no files; `on_row` is called after each."""
    rows = []
    for name in recipes:
        settings = [*overrides, "data.num_train=512"]
        config = load_config(name, [*settings, *task_class(load_config(name, settings).task).quick])
        report = dry_run(config)
        rows.append(
            {
                "recipe": name,
                "batch_size": config.train.batch_size,
                "seconds_per_step": round(report.seconds_per_step, 4),
                "parameters": sum(report.parameters.values()),
            }
        )
        on_row()
    return rows
