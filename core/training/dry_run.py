"""The time, memory and disk space of a run, measured on its first steps."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from crossflow.core.training.checkpoint import num_bytes
from crossflow.core.training.learner import Learner
from crossflow.core.training.sharding import local

WARM_UP = 2
"""Number of steps before the timed ones."""


@dataclass(frozen=True)
class DryRun:
    """Size, memory, time and disk space of a run."""

    parameters: dict[str, int]
    """Number of parameters of each part of the model (backbone, source_encoder, ...) and of the `objective`."""
    memory: dict[str, int]
    """Bytes on each device for weights, gradients, optimizer and ema, without activations."""
    peak_memory: int | None
    """Peak memory of the measured steps in bytes, including activations (GPU only)."""
    seconds_per_step: float
    cpu_seconds_per_step: float
    """Processor time of all threads of this process."""
    remaining_steps: int
    checkpoint_bytes: int
    keep: int
    """Number of checkpoints kept."""

    @property
    def remaining_seconds(self) -> float:
        """Seconds for the remaining steps, without validation and samples."""
        return self.seconds_per_step * self.remaining_steps

    @property
    def disk_bytes(self) -> int:
        """Bytes of the kept checkpoints and of the one being written."""
        return self.checkpoint_bytes * (self.keep + 1)


def measure(learner: Learner, steps: Iterator[None], num_steps: int, remaining_steps: int) -> DryRun:
    """Measures `num_steps` training steps after WARM_UP others; `steps`: of `Trainer.trial`."""
    on_gpu = learner.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(learner.device)
    seconds, cpu_seconds = [], []
    for _ in range(WARM_UP + num_steps):
        start, cpu_start = time.monotonic(), time.process_time()
        next(steps)
        if on_gpu:
            torch.cuda.synchronize(learner.device)
        seconds.append(time.monotonic() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    tensors = learner.tensors()
    return DryRun(
        parameters=_parameters(learner),
        memory=memory(learner),
        peak_memory=torch.cuda.max_memory_allocated(learner.device) if on_gpu else None,
        seconds_per_step=sum(seconds[WARM_UP:]) / num_steps,
        cpu_seconds_per_step=sum(cpu_seconds[WARM_UP:]) / num_steps,
        remaining_steps=remaining_steps,
        checkpoint_bytes=sum(map(num_bytes, tensors.values())),
        keep=learner.config.keep,
    )


def memory(learner: Learner) -> dict[str, int]:
    """Bytes on each device for weights, gradients, optimizer and ema."""
    return {
        "weights": sum(local(parameter).nbytes for parameter in learner.objective.parameters()),
        "gradients": sum(local(parameter).nbytes for parameter in learner.parameters),
        "optimizer": sum(local(value).nbytes for value in learner.tensors()["optimizer"].values()),
        "ema": sum(shadow.nbytes for shadow in learner.ema.shadows),
    }


def _parameters(learner: Learner) -> dict[str, int]:
    """Number of parameters of each part of the model, and of the learned parts of the losses."""
    numbers: dict[str, int] = {}
    for name, parameter in learner.objective.named_parameters():
        first, _, rest = name.partition(".")
        part = "objective" if first != "model" else rest.partition(".")[0] if "." in rest else "model"
        numbers[part] = numbers.get(part, 0) + parameter.numel()
    return numbers
