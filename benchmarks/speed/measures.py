"""How fast things are on this machine: rendering of scenes, training steps of recipes, reading of cached features,
sampling from the papers' models.

Medians of several rounds.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from crossflow.benchmarks.speed import reading
from crossflow.benchmarks.speed import sampling as generation
from crossflow.core.progress import Progress
from crossflow.engine.provenance import environment
from crossflow.engine.train import dry_run
from crossflow.tasks.base import load_config, task_class

ROUNDS = 3
SIZES, PROCESSES = (32, 64), (1, 2)


def _median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def render_scenes(first: int, count: int, size: int) -> int:
    """Makes and renders scenes first ... first + count - 1 of the training split; returns how many."""
    import torch

    from crossflow.data.readers import open_reader

    torch.set_num_threads(1)
    reader = open_reader("scenes", "train", image_size=size, limit=first + count)
    for start in range(first, first + count, 256):
        reader.load(range(start, min(start + 256, first + count)))
    return count


def scenes(
    sizes: Sequence[int] = SIZES,
    processes: Sequence[int] = PROCESSES,
    count: int = 1024,
    done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Images per second, scene creation included, with 1 and 2 processes of one thread each; `done` after each row."""
    rows = []
    for size in sizes:
        for number in processes:
            with ProcessPoolExecutor(number, mp_context=get_context("spawn")) as pool:

                def go(pool: ProcessPoolExecutor = pool, number: int = number, size: int = size) -> None:
                    share = count // number
                    list(pool.map(render_scenes, [i * share for i in range(number)], [share] * number, [size] * number))

                go()  # the processes start and import
                rows.append(
                    {"size": size, "processes": number, "images_per_second": round(count / _median_seconds(go))}
                )
                done()
    return rows


def training(
    recipes: Sequence[str], overrides: Sequence[str] = (), done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Seconds per step of recipes, measured by dry runs; `done` after each."""
    rows = []
    for name in recipes:
        given = [*overrides, "data.num_train=512"]
        config = load_config(name, [*given, *task_class(load_config(name, given).task).quick])
        report = dry_run(config)
        rows.append(
            {
                "recipe": name,
                "batch_size": config.train.batch_size,
                "seconds_per_step": round(report.seconds_per_step, 4),
                "parameters": sum(report.parameters.values()),
            }
        )
        done()
    return rows


PARTS = ("scenes", "training", "cache", "sampling")
USUAL = PARTS[:3]
"""Without being asked for; models of a billion parameters are too much for many machines."""


def speed(
    recipes: Sequence[str],
    folder: Path,
    *,
    parts: Sequence[str] = USUAL,
    sampled: Sequence[str] = generation.RECIPES,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The `PARTS` asked for, with the machine they were measured on. progress(done, total) after each measurement.

    recipes: whose training steps, sampled: whose sampling is timed.
    """
    numbers = {
        "scenes": len(SIZES) * len(PROCESSES),
        "training": len(recipes),
        "cache": reading.NUM_ROWS,
        "sampling": 2 * len(sampled),
    }
    counted, total = itertools.count(1), sum(numbers[part] for part in parts)

    def done() -> None:
        progress(next(counted), total)

    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "scenes": lambda: scenes(done=done),
        "training": lambda: training(recipes, done=done),
        "cache": lambda: reading.reading(folder / "reading", done=done),
        "sampling": lambda: generation.generation(sampled, done=done),
    }
    return {**{part: measure[part]() for part in PARTS if part in parts}, **environment()}
