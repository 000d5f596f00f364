"""The product beside the released manner: the same network and weights, alternating step by step in one process.

Each row first shows that both compute the same: loss and gradients of one batch, or the sampled latents.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossflow.benchmarks.speed.measuring import seconds_of
from crossflow.benchmarks.speed.networks import WORDS
from crossflow.benchmarks.speed.released_files import Content, write_released
from crossflow.benchmarks.speed.released_networks import ReleasedModel
from crossflow.benchmarks.speed.released_step import ReleasedTraining, released_samples
from crossflow.benchmarks.speed.training import Case, device_name, precision_name
from crossflow.core.batch import Batch
from crossflow.core.errors import UserError
from crossflow.core.noise import Noise
from crossflow.core.training.learner import Learner
from crossflow.core.training.stream import MicroBatch
from crossflow.engine.sample import Pipeline
from crossflow.engine.train import Run

WARM_UP, ROUNDS = 2, 5
NUM_FILES = 64
TOLERANCES = {"float32": (1e-4, 1e-3, 1e-3), "bf16": (1e-2, 0.1, 0.1), "fp16": (1e-2, 0.1, 0.1)}
"""Largest relative differences of loss, gradient and samples by precision. In half precision the two round at other
places: the product keeps norms and residuals in float32 and multiplies attention in half precision.
"""
SAME_STEP = ("loss.encoder=none", "source.dropout=0", "train.optimizer=adamw", "train.warmup_steps=0")
"""Settings of both: the losses that need no image tower, and no random dropout, so that results can be compared."""
SMALL_TEXT = ("text.feature_width=256", "source.width=256", "source.hidden=256", "source.depth=2")
SIZES = {
    "dimr-s at 32 x 32": Case("t2i_256_dimr_70m", (*SMALL_TEXT, "train.batch_size=2")),
    "dit-s/2 at 64 x 64": Case(
        "t2i_512_t5_dit",
        (*SMALL_TEXT, "text.scale=1", "backbone.size=S", "train.batch_size=2", "train.checkpointing=false"),
    ),
}
"""Sizes that a CPU can compare; a text encoder that takes a small part of the step leaves the time to the flow. As the
recipe of the small DiMR, and unlike those of the large models, they keep their activations.
"""
SMALL = (
    "text.feature_width=64", "source.width=64", "source.hidden=64", "source.depth=1", "source.heads=2",
    "backbone.size=tiny", "train.batch_size=4",
)  # fmt: skip
SMALL_SIZES = {
    "dimr, small": Case("t2i_256_dimr_70m", (*SMALL, "data.image_size=64"), small=True),
    "dit, small": Case("t2i_256_dimr_70m", (*SMALL, "data.image_size=64", "backbone.name=dit"), small=True),
}
"""For tests."""


def comparison(
    sizes: dict[str, Case],
    precisions: Sequence[str],
    rounds: int = ROUNDS,
    on_row: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Two rows per size and precision: training steps, and guided sampling; `on_row` is called after each pair."""
    rows = []
    for name, case in sizes.items():
        for precision in precisions:
            settings = (*case.overrides, *SAME_STEP)
            with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder:
                chosen = Case(case.recipe, settings, precision, case.compiled, case.small)
                rows += [{"size": name, **row} for row in _rows(chosen.open(Path(folder)), Path(folder), rounds)]
            on_row()
    return rows


def _rows(run: Run, folder: Path, rounds: int) -> list[dict[str, Any]]:
    _randomise(run)
    common = {"device": device_name(run.trainer().device), "precision": precision_name(run.config.train.precision)}
    return [{**common, **_training(run, folder, rounds)}, {**common, **_sampling(run, rounds)}]


def _randomise(run: Run) -> None:
    """Moves all weights: those that begin at zero would leave most of the network out of the outputs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


# -- training


def _training(run: Run, folder: Path, rounds: int) -> dict[str, Any]:
    trainer = run.trainer()
    device, config = trainer.device, run.config
    trial = trainer.trial(1 + WARM_UP + rounds)
    batches: list[Sequence[MicroBatch]] = []
    step = trainer.learner.step

    def recording(micro_batches: Sequence[MicroBatch], rate: float) -> Any:
        batches[:] = [micro_batches]
        return step(micro_batches, rate)

    trainer.learner.step = recording  # type: ignore[method-assign]
    next(trial)
    released = _released_training(run, folder, device)
    differences = _differences(trainer.learner, released, batches[0][0])
    for _ in range(WARM_UP):
        next(trial)
        released.step()
    pairs = [(seconds_of(lambda: next(trial), device), seconds_of(released.step, device)) for _ in range(rounds)]
    limits = dict(zip(("loss", "gradient"), TOLERANCES[precision_name(config.train.precision)], strict=False))
    return {
        "part": "training step",
        "batch_size": config.train.batch_size,
        **_ratio(pairs),
        **agreement(differences, limits),
    }


def _released_training(run: Run, folder: Path, device: torch.device) -> ReleasedTraining:
    config: Any = run.config
    content = Content("beside the cache", 14, 4, image_size=config.data.image_size, width=config.text.feature_width)
    if not (folder / "released").exists():
        write_released(folder / "released", NUM_FILES, content)
    model = ReleasedModel(run.model).to(device).train()
    scale = run.task.parts.codec.scale.to(device)
    return ReleasedTraining(model, config, sorted((folder / "released").glob("*.npy")), scale, device)


def _differences(learner: Learner, released: ReleasedTraining, micro_batch: MicroBatch) -> dict[str, float]:
    """Relative differences of loss and gradient of one batch, at the same weights."""
    batch, noise = micro_batch.batch, micro_batch.noise
    assert isinstance(batch, Batch), "recipes of one task are compared"
    assert isinstance(noise, Noise)
    (drawn,) = learner.objective.draw([batch], [noise])  # type: ignore[operator]
    loss, _ = learner.wrapped(drawn, noise)
    learner.accelerator.backward(loss)
    released_loss = released.loss(batch, noise)
    released_loss.backward()
    value, expected = loss.item(), released_loss.item()
    weights = dict(learner.model.named_parameters())
    difference = norm = 0.0
    for name, copy in released.model.weights.items():
        product_grad, grad = weights[name].grad, copy.grad
        assert (product_grad is None) == (grad is None), f"only one of the two trains {name}"
        if product_grad is not None and grad is not None:
            difference += (product_grad - grad).square().sum().item()
            norm += grad.square().sum().item()
    learner.objective.zero_grad(set_to_none=True)
    released.model.zero_grad(set_to_none=True)
    return {
        "loss": abs(value - expected) / abs(expected),
        "gradient": (difference / norm) ** 0.5,
    }


# -- sampling


def _sampling(run: Run, rounds: int) -> dict[str, Any]:
    precision = precision_name(run.config.train.precision)
    pipe = Pipeline(run.task, run.model.eval(), precision=precision)
    released = ReleasedModel(run.model).to(pipe.device).eval()
    settings = pipe.sample_settings(steps=2 if pipe.device.type == "cpu" else run.config.sample.steps)
    count = run.config.train.batch_size
    source = pipe.source([WORDS[number % len(WORDS)] for number in range(count)])
    z0 = pipe.latents(source, [str(number) for number in range(count)])

    def sample() -> Tensor:
        return pipe.generate(source, z0, settings)

    def sample_released(precision: str = precision) -> Tensor:
        return released_samples(released, z0, settings.steps, settings.guidance, precision)

    z1, expected = sample(), sample_released("float32")
    differences = {"samples": float((z1 - expected).norm() / (expected - z0).norm())}
    actions: list[Callable[[], object]] = [sample, sample_released, lambda: sample_released("float32")]
    times = [[seconds_of(action, pipe.device) for action in actions] for _ in range(WARM_UP + rounds)][WARM_UP:]
    return {
        "part": "guided sampling",
        "batch_size": count,
        "steps": settings.steps,
        "guidance": settings.guidance,
        **_ratio([(product, same) for product, same, _ in times]),
        "ratio_to_float32": round(statistics.median(exact / product for product, _, exact in times), 2),
        **agreement(differences, {"samples": TOLERANCES[precision][2]}),
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median seconds of both, and the median of the ratios of neighbouring measurements."""
    return {
        "product_seconds": round(statistics.median(product for product, _ in pairs), 4),
        "released_seconds": round(statistics.median(released for _, released in pairs), 4),
        "ratio": round(statistics.median(released / product for product, released in pairs), 2),
    }


def agreement(differences: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    """The differences beside their limits. Raises UserError for a larger one: times of different work say nothing."""
    wrong = [f"{name} by {value:.2g} (limit {limits[name]:g})" for name, value in differences.items()
             if not value <= limits[name]]  # fmt: skip
    if wrong:
        raise UserError(
            f"Product and released manner differ in {', '.join(wrong)}, so their times cannot be compared. Check the "
            "settings of both, and whether the device computes correctly (crossflow benchmark agreement)."
        )
    return {f"{name}_difference": float(f"{value:.2g}") for name, value in differences.items()} | {
        f"{name}_limit": value for name, value in limits.items()
    }
