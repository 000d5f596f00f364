"""train(config): builds task, model, objective and trainer, runs them, and leaves a complete run directory."""

import functools
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crossflow.core import distributed
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.noise import keyed_generator
from crossflow.core.settings import dump, flat
from crossflow.core.solvers import SOLVERS
from crossflow.core.training.checkpoint import checkpoints
from crossflow.core.training.tracking import Progress, Silent
from crossflow.core.training.trainer import DryRun, Trainer, TrainResult
from crossflow.data.dataset import Examples
from crossflow.data.images import save_png
from crossflow.data.readers import located
from crossflow.engine.provenance import MANIFEST, changed, describe, expect_same
from crossflow.engine.sample import WEIGHTS, Pipeline
from crossflow.engine.score import Scores, held_out_loss, laid_out, score, seen_in_training, show
from crossflow.engine.start_from import start_from
from crossflow.tasks.base import Case, Task, Tile, build_task, load_config

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Cases of a sample grid."""


FREE_TO_CHANGE = {
    f"train.{name}"
    for name in (
        "steps",
        "save_every",
        "keep",
        "eval_every",
        "sample_every",
        "log_every",
        "num_workers",
        "trackers",
        "max_minutes",
    )
} | {"data.train", "data.val"}
"""Settings with which a resumed run may differ: how long it goes on, what it writes, and where its data lie; whether
the training data are the same is seen by what is in them.
"""


@dataclass(frozen=True)
class Outcome:
    """What a training run leaves: where, how it ended, and the scores at the end beside the trivial baseline's."""

    folder: Path
    result: TrainResult
    scores: Scores | None = None
    baseline: dict[str, float] = field(default_factory=dict)


class TrainingSet:
    """Examples of a task, collated by it: what the trainer reads."""

    def __init__(self, examples: Examples, task: Task) -> None:
        self.examples, self.task = examples, task

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        return self.examples[place]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Any]:
        return self.examples.__getitems__(places)

    def collate(self, examples: Sequence[Any]) -> Any:
        return self.task.batch(examples)


class Run:
    """A run directory with its task, model and data; `train` and `dry_run` work on it."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        progress: Progress | None = None,
        resume: str | None = None,
        data_changed: bool = False,
    ) -> None:
        """Prepares the task, or reads it back when `resume`d. Raises UserError for unusable settings, data, folders.

        data_changed: a resumed run may go on with other training data than it began with.
        """
        self.config, self.folder = config, folder
        self.progress = progress if progress is not None and distributed.is_main() else Silent()
        self.resume, self.data_changed = resume, data_changed
        distributed.device()
        SOLVERS.get(config.sample.solver)  # a wrong name is better told before the training than after
        self.task = build_task(config)
        if resume is not None and checkpoints(folder / "checkpoints"):
            self.task.run_folder = folder  # its data are looked for where it was started
        self.data = self.task.dataset("train")
        self._prepare()
        torch.manual_seed(keyed_generator("weights", config.seed).initial_seed())
        self.model = self.task.build_model()
        self.objective = self.task.build_objective(self.model)
        other = config.train.start_from
        if other is not None and not (resume is not None and checkpoints(folder / "checkpoints")):
            self.progress.note(start_from(other, self.objective).told(other))
        if config.source.frozen:
            if other is None:
                raise UserError(
                    "source.frozen=true would keep a source encoder that has learned nothing: set train.start_from to "
                    "the run whose encoder it is."
                )
            self.model.source_encoder.requires_grad_(False)

    def _prepare(self) -> None:
        """Everything that comes before the flow: learned once by the main process, read by all from the run
        directory.
        """
        distributed.on_main(self._begin_or_continue)  # alone: a slower process would take what it leaves for a run
        # Read back even by the process that wrote it, so that a resumed run starts from the very same bits.
        self.task.restore(self.folder)
        self.task.accept(self.data)

    def _begin_or_continue(self) -> str:
        prepared = self.folder / "config.yaml"
        resumable = bool(checkpoints(self.folder / "checkpoints"))
        # What was refused after its preparations, such as for its backbone's size, has none of these: it is begun anew.
        begun = any((self.folder / name).exists() for name in ("metrics.jsonl", "checkpoints", *WEIGHTS.values()))
        if begun and self.resume is None:
            raise UserError(
                f"{self.folder} already holds a run{' with checkpoints' if resumable else ''}. "
                "Continue it with --resume auto, or choose another --output."
            )
        if self.resume is not None and resumable:
            self._check_same(prepared)
            self._check_data()
            write_atomically(prepared, dump(self._as_kept(load_config(prepared))))
        else:
            self._learn()
        return ""

    def _learn(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.prepare(self.data, self.progress.note)
        self._check_patches()
        self.task.save(self.folder)
        write_atomically(self.folder / MANIFEST, json.dumps(manifest(self.config, self.data), indent=1))
        write_atomically(self.folder / "config.yaml", dump(self.config))  # last: it says that the folder holds a run

    def _check_patches(self) -> None:
        shape, patch = self.task.latent_shape, self.config.backbone.grain
        if len(shape) == 3 and (shape[1] % patch or shape[2] % patch):
            raise UserError(
                f"Latents of {shape[1]} x {shape[2]} cannot be cut into the backbone's patches of {patch}: choose "
                f"another data.image_size (now {self.config.data.image_size}), backbone.patch, or, for dimr, "
                "backbone.num_stages."
            )

    def _check_same(self, prepared: Path) -> None:
        """A resumed run must be the same run, but for how long it goes on and what it writes."""
        before, now = flat(load_config(prepared).model_dump(mode="json")), flat(self.config.model_dump(mode="json"))
        different = [
            f"{name} ({before.get(name)} -> {value})"
            for name, value in now.items()
            if before.get(name) != value and name not in FREE_TO_CHANGE
        ]
        if different:
            raise UserError(
                f"The run in {self.folder} was started with other settings: {', '.join(different)}. "
                "Resume with its own settings, or start a new run in another --output."
            )

    def _check_data(self) -> None:
        if not self.data_changed:
            return expect_same(self.folder, self.data)
        write_atomically(self.folder / MANIFEST, json.dumps(changed(self.folder, self.data), indent=1))
        return None

    def _as_kept(self, before: Config) -> Config:
        """The configuration of a resumed run as its folder keeps it: new places of data are absolute, since relative
        ones are taken from the directory in which the run was started.
        """
        old, new = before.data.model_dump(), self.config.data.model_dump()
        moved = {
            name: located(new[name], Path.cwd(), here_first=False)
            for name in ("train", "val")
            if new[name] is not None and new[name] != old[name]
        }
        return self.config.model_copy(update={"data": self.config.data.model_copy(update=moved)})

    # -- training

    def _trainer(self) -> Trainer:
        return Trainer(
            self.config.train,
            self.objective,
            TrainingSet(self.data, self.task),
            run_dir=self.folder,
            seed=self.config.seed,
            latent_shape=self.task.latent_shape,
            sample=self._sample,
            validate=self._validate,
            progress=self.progress,
            settings=self.config.model_dump(mode="json"),
        )

    def dry_run(self) -> DryRun:
        """What the run will take: parameters, memory, time, disk."""
        return self._trainer().dry_run(resume=self.resume)

    def train(self) -> Outcome:
        """Trains, then scores the averaged weights on the validation split beside the trivial baseline."""
        self._open_validation()
        trainer = self._trainer()
        result = trainer.run(self.resume)
        if result.status == "stopped" or not distributed.is_main():
            return Outcome(self.folder, result)
        with trainer.ema.applied():
            return self._scored(result)

    def _open_validation(self) -> None:
        """Before the training, so that data which cannot be scored are not found out after hours."""
        self.validation  # noqa: B018
        if distributed.is_main():
            self.cases  # noqa: B018

    def _scored(self, result: TrainResult) -> Outcome:
        self.progress.note("Scoring the averaged weights on the validation split.")
        scores = score(self._pipeline(), self.cases, seed=self.config.seed, num_tiles=NUM_SAMPLES)
        scores.notes.extend(seen_in_training(self.data, self.validation))
        self._write_sheet(scores.pages, "final.png")
        baseline = self.task.baseline(self.data, self.cases)
        write_atomically(
            self.folder / "scores.json",
            json.dumps({"scores": scores.values, "intervals": scores.intervals, "baseline": baseline}, indent=1),
        )
        return Outcome(self.folder, result, scores, baseline)

    @functools.cached_property
    def cases(self) -> list[Case]:
        """What is scored during and after training: `data.num_val` cases of the validation split."""
        return self.task.cases(self.validation, self.config.data.num_val)

    @functools.cached_property
    def validation(self) -> Examples:
        examples = self.task.dataset("val", limit=self.config.data.num_val)
        self.task.accept(examples)
        return examples

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            self.task, self.model, folder=self.folder, weights="ema", device=str(next(self.model.parameters()).device)
        )

    def _validate(self, step: int) -> dict[str, float]:
        """Flow loss on held-out items, with their own sources and with those of other items."""
        return held_out_loss(self.task, self.model, self.validation)

    def _sample(self, step: int) -> None:
        if not distributed.is_main():
            return
        pages = show(self._pipeline(), self.cases[:NUM_SAMPLES], seed=self.config.seed)
        path = self._write_sheet(pages, f"step_{step:08d}.png")
        self.progress.note(f"Samples: {path}")

    def _write_sheet(self, pages: list[list[Tile]], name: str) -> Path:
        picture = laid_out(pages, cell=128)
        (self.folder / "samples").mkdir(exist_ok=True)
        return save_png(picture, self.folder / "samples" / name, {"seed": self.config.seed, "task": self.config.task})


def train(config: Config, folder: Path, *, progress: Progress | None = None, resume: str | None = None) -> Outcome:
    """Trains `config` into the run directory `folder`. resume: None, "auto", or a checkpoint's folder."""
    return Run(config, folder, progress=progress, resume=resume).train()


def new_folder(root: Path, name: str) -> Path:
    """root/name, or root/name-2, -3, ... when there is something already."""
    folder, number = root / name, 1
    while folder.exists():
        number += 1
        folder = root / f"{name}-{number}"
    return folder


PACKAGES = ("crossflow-toolkit", "torch", "accelerate", "transformers", "diffusers", "numpy")


def environment() -> dict[str, Any]:
    """Versions and machine, for manifests."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _revision(),
    }


def _revision() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None  # installed, perhaps inside another project's checkout
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def manifest(config: Config, data: Examples) -> dict[str, Any]:
    """What a run was made of."""
    return {
        "task": config.task,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": describe(data),
        **environment(),
    }


__all__ = ["DryRun", "Outcome", "Run", "environment", "manifest", "new_folder", "train"]
