"""A training on many GPUs, on paper: memory, checkpoints, bytes on the wire, samples and tokens per second.

W GPUs, P trained parameters in float32, of which Q belong to blocks; a ring of W passes (W - 1) / W of what it
exchanges through each GPU. Bytes that each GPU sends per step:
    unsharded    2 (W - 1) / W 4 P: gradients are summed and handed on, once per step
    sharded      (W - 1) / W 4 (2 P + Q) for each accumulated part: weights are gathered once, and those of blocks again
                 for the backward pass; gradients are summed and divided
"""

from collections.abc import Sequence
from dataclasses import dataclass

from crossflow.core.config import Config
from crossflow.core.training.prepare import blocks, check_sizes
from crossflow.core.weights import shapes_only
from crossflow.engine.health.plan import Plan, plan
from crossflow.tasks import task_class

STATE = ("weights", "gradients", "optimizer", "ema")


@dataclass(frozen=True)
class Machines:
    """What the machines do, as measured or assumed by whoever asks."""

    samples_per_second: float
    """Of one GPU in a training by itself, with the batch of a part."""
    network: float
    """Bytes per second that each GPU can send."""
    disk: float
    """Bytes per second that all processes together can write."""


@dataclass(frozen=True)
class Row:
    """A training on `gpus` GPUs, sharded or not; bytes are those of each GPU unless said otherwise."""

    gpus: int
    sharded: bool
    state: int
    """Bytes of weights, gradients, optimizer and average."""
    activations: int | None
    """The rest of a step's peak; None without data."""
    checkpoint: int
    """Bytes of all files of a checkpoint together."""
    checkpoint_seconds: float
    sent: float
    """Bytes sent per step."""
    slowest: float
    """Samples per second of all GPUs, if the exchange waits for the computation."""
    fastest: float
    """The same, if the two overlap wholly."""
    tokens: int
    """Positions of the backbone in a sample, of all its resolutions."""


def scaling(config: Config, gpus: Sequence[int], machines: Machines) -> list[Row]:
    """Rows for each number of GPUs: unsharded, and sharded on more than one.

    Raises UserError for invalid settings, or a batch that the GPUs and parts do not divide.
    """
    rows = []
    tokens, of_blocks = _backbone(config)
    for number in gpus:
        check_sizes(config.train, config.train.batch_size, number)
        size = plan(config, num_processes=number)
        rows += [
            _row(size, number, of_blocks if sharded else 0, tokens, machines)
            for sharded in ([False, True] if number > 1 else [False])
        ]
    return rows


def _row(size: Plan, gpus: int, gathered: int, tokens: int, machines: Machines) -> Row:
    """gathered: bytes of the parameters in blocks, which a sharded training gathers again; 0: unsharded."""
    config, sharded = size.config, gathered > 0
    whole = sum(size.memory[part] for part in STATE)
    known = size.checkpoint is not None
    # Model, average and optimizer state.
    checkpoint = size.checkpoint or sum(size.memory[part] for part in ("weights", "ema", "optimizer"))
    sent = sent_bytes(size.memory["gradients"], gathered, gpus, config.train.accumulate if sharded else 0)
    computing = config.train.batch_size / (gpus * machines.samples_per_second)
    exchanging = sent / machines.network
    return Row(
        gpus,
        sharded,
        -(-whole // gpus) if sharded else whole,
        size.memory["activations"] if known else None,
        checkpoint,
        checkpoint / machines.disk,
        sent,
        config.train.batch_size / (computing + exchanging),
        config.train.batch_size / max(computing, exchanging),
        tokens,
    )


def sent_bytes(trained: int, of_blocks: int, gpus: int, sharded_parts: int) -> float:
    """Bytes that each GPU sends per step; see the module.

    Args:
        trained: bytes of the trained parameters.
        of_blocks: bytes of those in blocks.
        gpus: number of GPUs.
        sharded_parts: accumulated parts of a sharded training; 0: unsharded.
    """
    return (gpus - 1) / gpus * ((2 * trained + of_blocks) * sharded_parts or 2 * trained)


def _backbone(config: Config) -> tuple[int, int]:
    """Tokens of a sample, and bytes of the parameters in blocks."""
    task = task_class(config.task).outline(config)
    with shapes_only():
        model = task.build_model()
    of_blocks = sum(parameter.nbytes for block in blocks(model) for parameter in block.parameters())
    tokens: int = model.backbone.num_tokens  # type: ignore[assignment]
    return tokens, of_blocks
