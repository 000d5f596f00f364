"""Evaluations of a recipe with its initial weights: items per second, sampled, judged and written."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossflow.benchmarks.evaluation.evaluate import Evaluation
from crossflow.benchmarks.speed.measuring import Clock, profiled, seconds_of
from crossflow.benchmarks.speed.sampling import opened
from crossflow.benchmarks.speed.training import Case, device_name

NUM_ITEMS = 64


def evaluation_speed(
    cases: Sequence[Case], num: int = NUM_ITEMS, on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row per case: `num` validation items scored by the task's own rules; `on_row` is called after each.

    A first evaluation of a few items is not counted: it trains or loads the judge.
    """
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder:
            rows.append(_row(case, Path(folder), num))
        on_row()
    return rows


def _row(case: Case, folder: Path, num: int) -> dict[str, Any]:
    _, pipe = opened(case, folder)
    for name in ("few", "timed", "profiled"):
        (folder / name).mkdir()
    few = Evaluation.open(pipe, split="val", num=2)
    warm_up = seconds_of(lambda: few.run(folder / "few"), pipe.device)
    evaluation = Evaluation.open(pipe, split="val", num=num)
    clock = Clock(pipe.device)
    pipe.outputs = clock.around("sampling", pipe.outputs)  # type: ignore[method-assign]
    seconds = seconds_of(lambda: evaluation.run(folder / "timed"), pipe.device)
    sampling = clock.take()["sampling"]
    shares, longest = profiled(lambda: evaluation.run(folder / "profiled"), pipe.device)
    return {
        "recipe": case.recipe,
        "device": device_name(pipe.device),
        "items": len(evaluation.plan.cases),
        "items_per_second": round(len(evaluation.plan.cases) / seconds, 2),
        "seconds": round(seconds, 3),
        "sampling_seconds": round(sampling, 3),
        "warm_up_seconds": round(warm_up, 2),
        "bound_by": shares.bound(),
        "longest_operators": longest,
    }
