"""Scores of a trained model on a split: run every case, score every output, keep what a picture page needs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from crossflow.core.config import GuidanceConfig, LossConfig, SampleConfig
from crossflow.core.model import CrossFlow
from crossflow.core.noise import training_noise
from crossflow.core.objective import Objective
from crossflow.data.dataset import Examples
from crossflow.data.sheet import sheet
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Case, Task, Tile

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""(what, done, total)."""


@dataclass(frozen=True)
class Scores:
    """Averages by name, their 95 % intervals, one row per item, the tiles of the first cases, and what should be
    said beside.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rows: list[dict[str, Any]]
    pages: list[list[Tile]]
    notes: list[str] = field(default_factory=list)


def score(
    pipe: Pipeline,
    cases: Sequence[Case],
    *,
    seed: int = 0,
    settings: SampleConfig | None = None,
    num_tiles: int = 16,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Runs the cases in batches of settings.batch_size and scores them. Noise follows from (seed, case id)."""
    chosen = settings or pipe.settings
    parts = list(batches(cases, chosen.batch_size))
    made = ((part, _run(pipe, part, seed, chosen)) for part in parts)
    return _scored(pipe, len(cases), made, num_tiles, thorough, progress)


def _run(pipe: Pipeline, part: Sequence[Case], seed: int, settings: SampleConfig) -> list[Any]:
    return pipe.outputs([case.input for case in part], [case.id for case in part], seed, settings)


def _scored(
    pipe: Pipeline,
    num: int,
    made: Iterable[tuple[Sequence[Case], list[Any]]],
    num_tiles: int,
    thorough: bool,
    progress: Progress | None,
) -> Scores:
    metric = pipe.task.metric(thorough)
    pages: list[list[Tile]] = []
    done = 0
    for part, outputs in made:
        for case, output in zip(part, outputs, strict=True):
            metric.add(case.id, output, case.truth)
            if len(pages) < num_tiles:
                pages.append(pipe.task.tiles(case, output))
        done += len(part)
        if progress is not None:
            progress("scoring", done, num)
    values = metric.compute()
    return Scores(values, metric.intervals(), metric.rows, pages, metric.notes)


def seen_in_training(train: Examples, held_out: Examples) -> list[str]:
    """A note when items that are scored are among those trained on, as when both are `folder:DIR@all`."""
    ours, theirs = held_out.reader, train.reader
    if ours.spec != theirs.spec or not (ours.split == theirs.split or "all" in (ours.split, theirs.split)):
        return []
    return [f"these scores are on training data: {ours.spec} ({ours.split}) is what the run trains on"]


def show(pipe: Pipeline, cases: Sequence[Case], *, seed: int = 0) -> list[list[Tile]]:
    """The tiles of some cases, not scored."""
    outputs = pipe.outputs([case.input for case in cases], [case.id for case in cases], seed)
    return [pipe.task.tiles(case, output) for case, output in zip(cases, outputs, strict=True)]


def arrange(pages: Sequence[Sequence[Tile]], cell: int) -> np.ndarray:
    """The tiles of cases in rows of about eight, a case's tiles side by side: uint8 (H, W, 3)."""
    tiles = [tile for page in pages for tile in page]
    columns = len(pages[0]) * max(1, 9 // len(pages[0]))
    return sheet([tile.image for tile in tiles], [tile.text for tile in tiles], columns=columns, cell=cell)


def batches(cases: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


@torch.no_grad()
def held_out_loss(task: Task, model: CrossFlow, examples: Examples, *, batch_size: int = 64) -> dict[str, float]:
    """Flow-matching loss on held-out items, each at one keyed time and noise: {"flow", "flow_shuffled"}.

    `flow_shuffled` gives each target the source of another item: how much the source tells shows in the difference.
    """
    config = task.config
    plain = config.model_copy(
        update={"loss": LossConfig(encoder="none", kl_weight=0.0), "guidance": GuidanceConfig(drop=0.0)}
    )
    objective = Objective(model, plain)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums, count = {"flow": 0.0, "flow_shuffled": 0.0}, 0
    for start in range(0, len(examples), batch_size):
        places = range(start, min(start + batch_size, len(examples)))
        batch = task.batch(examples.__getitems__(list(places))).to(device)
        noise = training_noise(config.seed, 0, list(places), batch.target.shape[1:]).to(device)
        other = torch.arange(len(places), device=device).roll(1)
        shuffled = replace(
            batch,
            features=batch.features[other],
            mask=None if batch.mask is None else batch.mask[other],
            condition=None if batch.condition is None else batch.condition[other],
        )
        for name, given in (("flow", batch), ("flow_shuffled", shuffled)):
            sums[name] += objective(given, noise)["flow"].item() * len(places)
        count += len(places)
    model.train(was_training)
    return {name: total / count for name, total in sums.items()}
