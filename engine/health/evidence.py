"""Everything the checks of a run look at: what it has logged and scored, and what is measured on its weights."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.weights import WEIGHTS
from crossflow.data.dataset import Examples
from crossflow.data.spec import split_forced
from crossflow.engine.folder import RunFolder
from crossflow.engine.health.posterior import PosteriorNumbers, measure_posterior
from crossflow.engine.health.reference import Reference, nearest, read_references
from crossflow.engine.provenance import open_data
from crossflow.engine.run_log import RunLog
from crossflow.engine.score import held_out_loss
from crossflow.tasks import load_config, load_model, task_class

NUM_MEASURED = 64
"""Validation items that posteriors and losses are measured on."""


@dataclass(frozen=True)
class Measured:
    """What was measured on the weights of a run with a few validation items."""

    num_items: int
    num_shared: int
    """How many of them are training items too."""
    losses: Mapping[str, Mapping[str, float]]
    """ema | model -> {"flow", "flow_shuffled", "one_step", ...}, see `held_out_loss`."""
    posterior: PosteriorNumbers | None
    """None without a source encoder."""
    latent_size: int
    """Number of values of a latent."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a run."""

    run: RunFolder
    config: Config
    log: RunLog
    scores: Mapping[str, Any]
    recipe: Reference | None
    """The reference of the task's recipe whose settings are nearest."""
    headline: Sequence[str]
    """The scores that the task shows first."""
    free_bytes: int
    """Of the disk that holds the run."""
    checkpoint_bytes: int
    """Of the newest checkpoint; 0 without one."""
    measured: Measured | None
    not_measured: str = ""
    """Why nothing was measured."""

    @property
    def reference(self) -> Reference | None:
        """The recipe whose bands can be held against the run."""
        return self.recipe if self.recipe is not None and self.recipe.fits(self.config) else None

    def advice_on_differences(self) -> str:
        """What to suspect when a run falls behind its reference."""
        assert self.recipe is not None
        different = self.recipe.differences(self.config)
        if not different:
            return "Its settings are those of the recipe: check the data, and whether the code has been changed."
        listed = ", ".join(f"{name}={value}" for name, value in different.items())
        return f"The settings that differ from the recipe are the first suspects: {listed}."

    @property
    def step(self) -> int:
        """Completed optimizer steps, as far as they are known."""
        return max(self.log.last_step, self.run.last_step or 0)


def gather(folder: Path, *, references: Sequence[Reference] | None = None, measure: bool = True) -> Evidence:
    """Reads a run directory, and measures its weights on validation items where that is possible.

    references: those of the shipped recipes by default. Raises UserError for a folder that holds no run.
    """
    run = RunFolder(folder)
    if not run.is_run:
        raise UserError(f"{folder} holds no run: it has no {run.config.name}. Give the directory of a run, runs/NAME.")
    config = load_config(folder)
    measured, reason = None, "it was not asked for"
    if measure:
        try:
            measured, reason = _measure(folder, config), ""
        except UserError as error:
            reason = str(error)
    newest = next(iter(run.checkpoints), None)
    files = [] if newest is None else [path for path in newest.iterdir() if path.is_file()]
    return Evidence(
        run=run,
        config=config,
        log=RunLog.read(folder),
        scores=run.read_scores(),
        recipe=nearest(config, read_references() if references is None else references),
        headline=task_class(config.task).Scoring.headline,
        free_bytes=shutil.disk_usage(folder).free,
        checkpoint_bytes=sum(path.stat().st_size for path in files),
        measured=measured,
        not_measured=reason,
    )


def _measure(folder: Path, config: Config) -> Measured:
    kind, run = task_class(config.task), RunFolder(folder)
    num = min(NUM_MEASURED, config.data.num_val)
    held_out = open_data(kind, config, "val", run=folder, limit=num)
    losses, posterior = {}, None
    for weights, file in WEIGHTS.items():
        if (run.root / file).is_file():
            task, model = load_model(folder, weights=weights)
            losses[weights] = held_out_loss(task, model, held_out, batch_size=num)
            posterior = posterior or measure_posterior(task, model, held_out)
    if not losses:
        raise UserError(f"{folder} has no weights yet: they are saved with the first checkpoint (train.save_every).")
    train = open_data(kind, config, "train", run=folder)
    size = 1
    for length in task.latent_shape:
        size *= length
    return Measured(len(held_out), shared_items(train, held_out), losses, posterior, size)


def shared_items(train: Examples, held_out: Examples) -> int:
    """How many of the held-out items are training items too: of the same place, under the same id."""
    if split_forced(train.reader.spec)[0] != split_forced(held_out.reader.spec)[0]:
        return 0
    scored = set(held_out.reader.ids)
    return sum(id in scored for id in train.reader.ids)
