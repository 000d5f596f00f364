"""Sampling by a recipe's own `Pipeline`: outputs per second, from inputs to finished outputs on the host.

The parts of a batch are the frozen encoder of its inputs, the source encoder, the flow with its guidance, and the
decoder of the latents. Weights are random, since speed does not depend on them.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crossflow.benchmarks.speed.measuring import (
    Clock,
    ceiling,
    counted,
    medians,
    peak_bytes,
    profiled,
    reset_peak,
    seconds_of,
)
from crossflow.benchmarks.speed.training import Case, device_name
from crossflow.core.sampling import count_evaluations
from crossflow.engine.sample import Pipeline, load
from crossflow.engine.train import Run

PARTS = ("encode", "source", "flow", "decode")
ROUNDS, PART_ROUNDS = 3, 1
ON_CPU_STEPS = 2
"""A CPU takes minutes for the papers' models with all their steps; two show the same shares."""
SMALL_MODEL = 2 * 10**7
"""Parameters up to which a CPU takes all steps."""


def sampling_speed(
    cases: Sequence[Case], batch_size: int | None = None, on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row per case; `on_row` is called after each.

    batch_size: outputs at a time; None: the recipe's on a GPU, at most 8 on a CPU.
    """
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder:
            run, pipe = opened(case, Path(folder))
            rows.append(_row(case, run, pipe, batch_size))
        on_row()
    return rows


def opened(case: Case, folder: Path) -> tuple[Run, Pipeline]:
    """A run of the case with its initial weights, and its pipeline as `crossflow.load` makes it; a precision of None is
    the device's own.
    """
    # The encoder loss and its image tower belong to training.
    overrides = (*case.overrides, "loss.encoder=none")
    run = replace(case, overrides=overrides, precision=None, compiled=False).open(folder, cached=False)
    Pipeline(run.task, run.model, folder=run.folder, device="cpu").save(run.folder)
    return run, load(run.folder, precision=case.precision, compile=case.compiled)


def _row(case: Case, run: Run, pipe: Pipeline, batch_size: int | None) -> dict[str, Any]:
    device, on_cpu = pipe.device, pipe.device.type == "cpu"
    size = sum(parameter.numel() for parameter in pipe.model.parameters())
    count = batch_size or (min(8, pipe.settings.batch_size) if on_cpu else pipe.settings.batch_size)
    steps = min(ON_CPU_STEPS, pipe.settings.steps) if on_cpu and size > SMALL_MODEL else pipe.settings.steps
    examples = run.cases
    inputs = [examples[number % len(examples)].input for number in range(count)]

    def sample() -> None:
        pipe(inputs, output_type="np", steps=steps, batch_size=count)

    reset_peak(device)
    warm_up = seconds_of(sample, device)
    seconds = statistics.median(seconds_of(sample, device) for _ in range(ROUNDS))
    parts = medians([_parts(pipe, sample) for _ in range(PART_ROUNDS)])
    shares, longest = profiled(sample, device)
    with counted() as counter:
        sample()
    operations, limit = counter.get_total_flops(), ceiling(device, pipe.precision)
    evaluations = count_evaluations(**{**pipe.settings.model_dump(exclude={"mode", "batch_size"}), "steps": steps})
    return {
        "recipe": case.recipe,
        **({"settings": " ".join(case.overrides)} if case.overrides else {}),
        "device": device_name(device),
        "precision": pipe.precision,
        "compiled": case.compiled,
        "batch_size": count,
        "steps": steps,
        "guidance": pipe.settings.guidance,
        "evaluations": evaluations,
        "parameters": size,
        "outputs_per_second": round(count / seconds, 3),
        **{f"{name}_seconds": round(parts[name], 4) for name in PARTS if name in parts},
        "warm_up_seconds": round(warm_up, 2),
        "operations_per_batch": operations,
        "ceiling_per_second": round(limit),
        "utilisation": round(operations / seconds / limit, 3),
        "peak_bytes": peak_bytes(device),
        "bound_by": shares.bound(),
        "longest_operators": longest,
    }


def _parts(pipe: Pipeline, sample: Callable[[], None]) -> dict[str, float]:
    """Seconds of each part of one call, the device waited for after each."""
    clock = Clock(pipe.device)
    watched = {"source": "encode", "latents": "source", "solve": "flow", "decode": "decode"}
    for method, part in watched.items():
        setattr(pipe, method, clock.around(part, getattr(pipe, method)))
    try:
        sample()
    finally:
        for method in watched:
            delattr(pipe, method)  # the method of the class shows again
    return clock.take()
