"""Training steps of a recipe by its own `Trainer`: samples per second, the parts of a step, memory, utilisation."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossflow.benchmarks.speed.measuring import (
    Clock,
    Shares,
    ceiling,
    counted,
    medians,
    peak_bytes,
    profiled,
    reset_peak,
    seconds_of,
)
from crossflow.benchmarks.speed.networks import offline_config
from crossflow.core.training.trainer import Trainer
from crossflow.engine.train import Run

PHASES = ("data", "encode", "forward", "backward", "optimizer", "ema")
WARM_UP, STEPS = 2, 5
FORWARDS = 3
"""Operations of a step by the usual convention: the backward pass counts as two forward passes. What is recomputed to
save memory is not counted.
"""


@dataclass(frozen=True)
class Case:
    """What is measured: a recipe with settings in a precision (None: its own), compiled or not."""

    recipe: str
    overrides: tuple[str, ...] = ()
    precision: str | None = None
    """float32, bf16 or fp16."""
    compiled: bool = False
    small: bool = False

    def open(self, folder: Path, *, cached: bool = True) -> Run:
        """A run of this case in `folder`, with random frozen networks and, if `cached`, random cached features."""
        precision = "no" if self.precision == "float32" else self.precision
        settings = [*self.overrides, *([f"train.precision={precision}"] if precision else [])]
        settings.append(f"train.compile={str(self.compiled).lower()}")
        return Run.open(offline_config(self.recipe, settings, folder, cached=cached, small=self.small), folder / "run")


def training_speed(
    cases: Sequence[Case], steps: int = STEPS, on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row per case; `on_row` is called after each."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder:
            rows.append(_row(case, case.open(Path(folder)), steps))
        on_row()
    return rows


def _row(case: Case, run: Run, steps: int) -> dict[str, Any]:
    config, trainer = run.config, run.trainer()
    device = trainer.device
    trial = trainer.trial(WARM_UP + 2 * steps + 2)
    reset_peak(device)
    warm_up = seconds_of(lambda: _make(trial, WARM_UP), device)
    seconds = [seconds_of(lambda: next(trial), device) for _ in range(steps)]
    phases = medians([_phases(trainer, trial) for _ in range(steps)])
    step = statistics.median(seconds)
    shares, longest = profiled(lambda: next(trial), device)
    shares = Shares(shares.products, shares.idle, phases.get("data", 0.0) / max(sum(phases.values()), 1e-9))
    operations = FORWARDS * forward_operations(trainer, trial)
    precision = precision_name(config.train.precision)
    limit = ceiling(device, precision)
    return {
        "recipe": case.recipe,
        **({"settings": " ".join(case.overrides)} if case.overrides else {}),
        "device": device_name(device),
        "precision": precision,
        "compiled": config.train.compile,
        "batch_size": config.train.batch_size,
        "parameters": sum(parameter.numel() for parameter in run.objective.parameters()),
        "seconds_per_step": round(step, 4),
        "samples_per_second": round(config.train.batch_size / step, 2),
        **{f"{name}_seconds": round(phases[name], 4) for name in PHASES if name in phases},
        "warm_up_seconds": round(warm_up, 2),
        "operations_per_step": operations,
        "ceiling_per_second": round(limit),
        "utilisation": round(operations / step / limit, 3),
        "peak_bytes": peak_bytes(device),
        "bound_by": shares.bound(),
        "longest_operators": longest,
    }


def _make(trial: Iterator[None], count: int) -> None:
    for _ in itertools.islice(trial, count):
        pass


def _phases(trainer: Trainer, trial: Iterator[None]) -> dict[str, float]:
    """Seconds of each phase of the next step, the device waited for after each."""
    before, clock = trainer.learner.phase, Clock(trainer.device)
    trainer.learner.phase = clock.phase
    next(trial)
    trainer.learner.phase = before
    return clock.take()


def forward_operations(trainer: Trainer, trial: Iterator[None]) -> int:
    """Floating-point operations in the forward passes of the next step, counted by torch."""
    before, counters = trainer.learner.phase, []

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        if name != "forward":
            yield
            return
        with counted() as counter:
            yield
        counters.append(counter)

    trainer.learner.phase = counting
    next(trial)
    trainer.learner.phase = before
    return sum(counter.get_total_flops() for counter in counters)


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision_name(precision: str) -> str:
    """The name outside the trainer, which calls float32 `no`."""
    return "float32" if precision == "no" else precision
