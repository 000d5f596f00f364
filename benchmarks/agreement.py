"""Whether this machine's device computes what its CPU computes: sampling, losses and gradients, resumed training.

Each check is a relative difference with a limit. On a machine without another device the CPU is compared with itself.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.files import read_tensors
from crossflow.core.precision import autocast
from crossflow.core.training.stream import MicroBatch
from crossflow.core.training.trainer import Trainer
from crossflow.core.weights import WEIGHTS
from crossflow.engine.sample import Pipeline, load
from crossflow.engine.train import Run
from crossflow.tasks import load_config, task_class

NUM_INPUTS = 4
LIMITS = {"float32": 1e-2, "bf16": 0.1}
"""Limits between the CPU in float32 and the device by precision. In float32 kernels add in another order, convolutions
on NVIDIA GPUs round inputs to TF32 (1e-3) by torch's default, and a flow of many steps amplifies the differences.
"""
RESUMED = 1e-3
"""Limit between a resumed and an uninterrupted training of four steps; 0 on a CPU, whose kernels are deterministic."""
SHORT = (
    "data.num_train=32", "data.num_val=4", "train.batch_size=4", "train.schedule=constant", "train.warmup_steps=0",
    "train.save_every=2", "train.precision=no",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A comparison."""

    subject: str
    """The run or recipe."""
    what: str
    difference: float
    """Relative: the norm of the difference over that of the expected values."""
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the difference is within the limit; not if it is NaN."""
        return self.difference <= self.limit


def agreement(
    runs: Sequence[Path], recipes: Sequence[str], folder: Path, on_check: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Samples from the `runs` on the CPU and the device, and trains a few steps of the `recipes` on both.

    folder: for temporary files; on_check: called after each check. Raises UserError for runs that cannot be read.
    """
    checks = []
    for check in _checks(runs, recipes, folder):
        checks.append(check)
        on_check(check)
    return checks


def _checks(runs: Sequence[Path], recipes: Sequence[str], folder: Path) -> Iterator[Check]:
    for run in runs:
        yield from sampling_checks(run)
    for recipe in recipes:
        yield from training_checks(recipe, folder / recipe)
        yield resume_check(recipe, folder / recipe)


def difference(values: Tensor, expected: Tensor) -> float:
    """|values - expected| / |expected|, both moved to the CPU as float64."""
    values, expected = values.detach().cpu().double(), expected.detach().cpu().double()
    return float((values - expected).norm() / expected.norm().clamp(min=1e-12))


def sampling_checks(run: Path) -> Iterator[Check]:
    """The latents that a run samples on the device, beside those of the CPU in float32."""
    expected = _latents(load(run, device="cpu", precision="float32"))
    for precision, limit in LIMITS.items():
        latents = _latents(load(run, precision=precision))
        yield Check(str(run), f"sampling in {precision}", difference(latents, expected), limit)


def _latents(pipe: Pipeline) -> Tensor:
    """The latents of the first validation inputs, flattened into one vector."""
    scoring = pipe.task.scoring(seed=0)
    cases = scoring.cases(pipe.dataset("val", limit=NUM_INPUTS, options=scoring.options), NUM_INPUTS).all()
    outputs = pipe([case.input for case in cases], ids=[case.id for case in cases], return_latents=True)
    assert outputs.latents is not None
    return torch.cat([latent.float().flatten() for latent in outputs.latents])


def training_checks(recipe: str, folder: Path) -> Iterator[Check]:
    """Loss and gradient of the first batch on the device, beside those of the CPU in float32."""
    run = open_run(recipe, folder / "first", steps=1)
    trainer = run.trainer()
    micro_batch = first_batch(trainer)
    objective = trainer.learner.objective
    reference = copy.deepcopy(objective).cpu()
    expected = _loss_and_gradient(reference, micro_batch, torch.device("cpu"))
    for precision, limit in LIMITS.items():
        with autocast(trainer.device, precision):
            values = _loss_and_gradient(objective, micro_batch, trainer.device)
        for what, value, reference_value in zip(("loss", "gradient"), values, expected, strict=True):
            yield Check(recipe, f"{what} in {precision}", difference(value, reference_value), limit)


def open_run(recipe: str, folder: Path, *, steps: int, resume: str | None = None) -> Run:
    """A short training of a recipe."""
    quick = task_class(load_config(recipe).task).quick
    return Run.open(load_config(recipe, [*SHORT, *quick, f"train.steps={steps}"]), folder, resume=resume)


def train(recipe: str, folder: Path, *, steps: int, resume: str | None = None) -> torch.device:
    """Trains to `steps` without scoring; returns the device."""
    run = open_run(recipe, folder, steps=steps, resume=resume)
    try:
        trainer = run.trainer()
        trainer.run(resume)
    finally:
        run.release()
    return trainer.device


def first_batch(trainer: Trainer) -> MicroBatch:
    """The first micro-batch of a trainer, which makes a step with it."""
    batches: list[MicroBatch] = []
    step = trainer.learner.step

    def recording(micro_batches: Sequence[MicroBatch], rate: float) -> object:
        batches.extend(micro_batches)
        return step(micro_batches, rate)

    trainer.learner.step = recording  # type: ignore[assignment, method-assign]
    next(trainer.trial(1))
    return batches[0]


def _loss_and_gradient(objective: nn.Module, micro_batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The loss and all gradients in one vector."""
    batch, noise = micro_batch.batch.to(device), micro_batch.noise.to(device)
    objective.zero_grad(set_to_none=True)
    loss = objective(batch, noise)["loss"]
    loss.backward()
    gradients = [weight.grad.flatten().float() for weight in objective.parameters() if weight.grad is not None]
    return loss.view(1), torch.cat(gradients)


def resume_check(recipe: str, folder: Path) -> Check:
    """The weights of four steps, beside those of two steps and two more after resuming."""
    train(recipe, folder / "whole", steps=4)
    train(recipe, folder / "resumed", steps=2)
    device = train(recipe, folder / "resumed", steps=4, resume="auto")
    whole, resumed = (read_tensors(folder / name / WEIGHTS["model"]) for name in ("whole", "resumed"))
    vectors = [torch.cat([tensor.flatten().double() for tensor in tensors.values()]) for tensors in (resumed, whole)]
    limit = 0.0 if device.type == "cpu" else RESUMED
    return Check(recipe, "weights after resuming", difference(vectors[0], vectors[1]), limit)
