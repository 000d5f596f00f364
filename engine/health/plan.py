"""What a training will take, before its first step: data, memory on each device, checkpoints on the disk."""

from dataclasses import dataclass

import torch

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import size_in_words
from crossflow.core.noise import training_noise
from crossflow.core.training.memory import StepMemory, rehearse
from crossflow.core.weights import shapes_only
from crossflow.data.dataset import Examples
from crossflow.engine.health.finding import Finding
from crossflow.engine.health.machine import Device
from crossflow.engine.teacher import inherited_task, teacher_of
from crossflow.engine.train import estimate, outline
from crossflow.tasks import task_class
from crossflow.tasks.base import Report


@dataclass(frozen=True)
class Plan:
    """The size of a training."""

    config: Config
    num_train: int | None
    """Training items; None when the data cannot be read."""
    num_val: int | None
    parameters: dict[str, int]
    """Number of parameters by part."""
    num_trained: int
    """Number of those that are trained."""
    memory: dict[str, int]
    """Bytes on each device by part. Without data: as far as settings determine them, without activations."""
    peak: int
    checkpoint: int | None
    """Bytes of a checkpoint; None without data."""
    problems: list[Finding]
    """Why data or networks cannot be read."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of the kept checkpoints and of the one being written; 0 while a checkpoint's size is unknown."""
        return (self.checkpoint or 0) * (self.config.train.keep + 1)


def plan(config: Config, *, num_processes: int = 1, report: Report = lambda line: None) -> Plan:
    """The plan of a training, whose memory is that of a step rehearsed without allocating anything.

    The data are opened, and what a run learns before its flow is learned (in short, with the overrides `Task.quick`);
    data or networks that are unavailable become `problems`. Raises UserError for invalid settings.
    """
    problems: list[Finding] = []
    size = estimate(config)
    train, val = (_open(config, split, problems) for split in ("train", "val"))
    memory, peak, checkpoint = size.memory, sum(size.memory.values()), None
    num_trained = size.num_trained
    if train is not None:
        try:
            step, frozen = _rehearse(config, train, num_processes, report)
        except UserError as error:
            problems.append(Finding("networks", str(error), "Until then activations and checkpoints are unknown."))
        else:
            num_trained = step.num_trained
            memory = step.parts | ({"frozen networks": frozen} if frozen else {})
            peak, checkpoint = step.peak + frozen, step.checkpoint
    numbers = [None if data is None else len(data) for data in (train, val)]
    return Plan(config, numbers[0], numbers[1], size.parameters, num_trained, memory, peak, checkpoint, problems)


def examine_plan(plan: Plan, device: Device, free: int) -> list[Finding]:
    """What stands in the way of a training on `device`, with `free` bytes on the disk."""
    findings = list(plan.problems)
    train = plan.config.train
    if plan.num_train is not None and plan.num_train < train.batch_size:
        findings.append(
            Finding(
                "small data",
                f"A batch of {train.batch_size} holds each of the {plan.num_train} training items more than once.",
                "Train on more items or with a smaller train.batch_size.",
                "warning",
            )
        )
    room = device.total if device.free is None else device.free
    if plan.peak > room:
        findings.append(
            Finding(
                "memory",
                f"A step takes {'at least ' * (plan.checkpoint is None)}{size_in_words(plan.peak)}, and {device.name} "
                f"has {size_in_words(int(room))}.",
                f"Raise train.accumulate (now {train.accumulate}), which divides the activations, set "
                "train.checkpointing=true, or choose a smaller backbone.size.",
            )
        )
    if plan.disk_bytes > free:
        findings.append(
            Finding(
                "disk",
                f"{train.keep + 1} checkpoints take {size_in_words(plan.disk_bytes)}, and {size_in_words(free)} are "
                "free.",
                "Free some space, choose another --output, or lower train.keep.",
            )
        )
    return findings


def _open(config: Config, split: str, problems: list[Finding]) -> Examples | None:
    try:
        return task_class(config.task).dataset(config, split)
    except UserError as error:
        if str(error) not in (problem.sentence for problem in problems):
            problems.append(Finding("data", str(error), f"Nothing is trained before the {split} data can be read."))
        return None


def _rehearse(config: Config, data: Examples, num_processes: int, report: Report) -> tuple[StepMemory, int]:
    """The memory of a step, and the bytes of the frozen networks beside it."""
    kind = task_class(config.task)
    task = inherited_task(kind, config, data, report) or kind.learn(config, data, report)
    batch = task.prepare(task.collate(data.first(2)))
    noise = training_noise(config.seed, 0, range(len(batch)), task.latent_shape)
    model = outline(task)
    with shapes_only():
        objective = task.build_objective(model)
    if (teacher := teacher_of(task)) is not None:
        objective.teach(teacher)
    step = rehearse(config.train, objective, batch, noise, num_processes=num_processes)
    trained = {id(weight) for weight in objective.parameters()}
    offloads = config.train.offload and torch.cuda.is_available()
    networks = () if offloads else task.networks
    weights = {id(weight): weight for network in networks for weight in network.parameters()}
    return step, sum(weight.nbytes for name, weight in weights.items() if name not in trained)
