"""Scores of a model on a split, the pictures that show them, and its loss on held-out items."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from crossflow.core import distributed
from crossflow.core.batch import Batch
from crossflow.core.config import GuidanceConfig, IntervalConfig, LossConfig
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Noise, training_noise
from crossflow.core.objective import Objective
from crossflow.core.paths import PathPoint
from crossflow.data.cases import Case, Tile
from crossflow.data.dataset import Examples
from crossflow.data.sheet import sheet
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Scoring, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """The scores of a split: averages by name, their 95 % intervals, one row per item, the tiles of the first cases,
    and notes for the reader.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rows: list[dict[str, Any]]
    pages: list[list[Tile]]
    notes: list[str] = field(default_factory=list)


def score(pipe: Pipeline, scoring: Scoring, cases: Sequence[Case], *, seed: int = 0, num_tiles: int = 16) -> Scores:
    """Samples and scores the cases in batches of the recipe's size; the noise follows from (seed, case id).

    num_tiles: number of cases whose tiles are kept.
    """
    metric = scoring.metric()
    pages: list[list[Tile]] = []
    for part in batches(cases, pipe.settings.batch_size):
        outputs = _outputs(pipe, part, seed)
        metric.add_all([case.id for case in part], outputs, [case.truth for case in part])
        shown = zip(part[: num_tiles - len(pages)], outputs, strict=False)
        pages += [scoring.tiles(case, output) for case, output in shown]
    values = metric.compute()
    return Scores(values, metric.intervals(), metric.rows, pages, metric.notes)


def show(pipe: Pipeline, scoring: Scoring, cases: Sequence[Case], *, seed: int = 0) -> list[list[Tile]]:
    """The tiles of some cases, without scores."""
    return [scoring.tiles(case, output) for case, output in zip(cases, _outputs(pipe, cases, seed), strict=True)]


def _outputs(pipe: Pipeline, cases: Sequence[Case], seed: int) -> list[Any]:
    return pipe.outputs([case.input for case in cases], [case.id for case in cases], seed)


def overlap_with_training(train: Examples, held_out: Examples) -> list[str]:
    """A note if scored items are also training items, as when both are `folder:DIR@all`; otherwise an empty list."""
    scored, trained = held_out.reader, train.reader
    same_split = scored.split == trained.split or "all" in (scored.split, trained.split)
    if scored.spec != trained.spec or not same_split:
        return []
    return [f"these scores are on training data: the run trains on {scored.spec} ({scored.split})"]


def arrange(pages: Sequence[Sequence[Tile]], cell: int) -> np.ndarray:
    """The tiles of cases in rows of about eight, a case's tiles side by side: uint8 (H, W, 3)."""
    tiles = [tile for page in pages for tile in page]
    columns = len(pages[0]) * max(1, 9 // len(pages[0]))
    return sheet([tile.image for tile in tiles], [tile.text for tile in tiles], columns=columns, cell=cell)


def batches(cases: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The cases in order, `size` at a time; the last batch may be smaller.

    >>> list(batches("abcde", 2))
    ['ab', 'cd', 'e']
    """
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


@torch.no_grad()
def held_out_loss(task: Task, model: CrossFlow, examples: Examples, *, batch_size: int = 64) -> dict[str, float]:
    """Flow-matching loss on held-out items, each at one keyed time and noise: {"flow", "flow_shuffled", ...}.

    `flow_shuffled` gives each target the source of another item: the difference shows how much the source matters. The
    other numbers are those of `_source_numbers`.
    The batches are divided among all processes, each of which must call this; every one gets the same numbers, to the
    same bits with any number of processes.
    """
    plain = task.config.model_copy(
        update={
            "loss": LossConfig(encoder="none", kl_weight=0.0),
            "guidance": GuidanceConfig(drop=0.0),
            "interval": IntervalConfig(),  # of a flow map: the loss of its velocities
        }
    )
    objective = Objective(model, plain)

    def losses(places: Sequence[int]) -> dict[str, float]:
        return _flow_losses(objective, task, examples, places)

    was_training = model.training
    model.eval()
    parts = list(distributed.shared(list(batches(range(len(examples)), batch_size)), losses))
    model.train(was_training)

    def means() -> dict[str, float]:
        names = parts[0][1]
        return {name: sum(loss[name] * len(places) for places, loss in parts) / len(examples) for name in names}

    return distributed.on_main(means)


def _flow_losses(objective: Objective, task: Task, examples: Examples, places: Sequence[int]) -> dict[str, float]:
    """The losses of `held_out_loss` of the examples at `places`."""
    device = next(objective.model.parameters()).device
    batch = task.prepare(task.collate(examples.__getitems__(list(places))))
    # Without unconditional samples, which would be drawn among the batches of all processes.
    batch = replace(batch, unconditional=torch.zeros(len(batch), dtype=torch.bool, device=device))
    noise = training_noise(task.config.seed, 0, places, batch.target.shape[1:]).to(device)
    other = torch.arange(len(places), device=device).roll(1)
    shuffled = replace(
        batch,
        features=batch.features[other],
        mask=None if batch.mask is None else batch.mask[other],
        condition=None if batch.condition is None else batch.condition[other],
    )
    flows = {
        name: objective(inputs, noise)["flow"].item() for name, inputs in (("flow", batch), ("flow_shuffled", shuffled))
    }
    return flows | _source_numbers(objective, batch, noise)


def _source_numbers(objective: Objective, batch: Batch, noise: Noise) -> dict[str, float]:
    """How much the sources of a batch say about its targets, and what they look like.

    one_step: mean squared error of the end of one step from t = 0, which at best is the variance of the targets that
    the source leaves open; target_variance: all of their variance over the items. Of a source encoder also source_size
    (root mean square of the means), source_spread (their deviation over the items, averaged over the values of the
    latent) and source_deviation (that of the posterior, 0 for a point).
    """
    model = objective.model
    posterior = model.source_encoder(batch.features, batch.mask)
    z0, start = posterior.sample(noise=noise.source), torch.zeros_like(noise.time)
    assert batch.unconditional is not None
    velocity = model.velocity(z0, start, batch.unconditional, model.encode_condition(batch.condition))
    end = objective.path.end(PathPoint(start, z0, velocity))
    weight = torch.ones_like(batch.target) if batch.weight is None else batch.weight.expand_as(batch.target)
    middle = (weight * batch.target).sum(0) / weight.sum(0).clamp(min=1e-6)
    numbers = {
        "one_step": (weight * (end - batch.target).square()).sum() / weight.sum().clamp(min=1e-6),
        "target_variance": (weight * (batch.target - middle).square()).sum() / weight.sum().clamp(min=1e-6),
    }
    if model.source_encoder.trunk is not None:
        numbers["source_size"] = posterior.mean.square().mean().sqrt()
        numbers["source_spread"] = posterior.mean.std(0, correction=0).mean()
        deviation = torch.zeros(()) if posterior.log_var is None else (posterior.log_var / 2).exp().mean()
        numbers["source_deviation"] = deviation
    return {name: value.item() for name, value in numbers.items()}
