"""The run directory: the names of its files, what makes it complete, how it is read and written.

    config.yaml              the complete configuration; written last when a run is prepared
    manifest.json            versions, command line, machine and data of the run
    model.safetensors        weights of the last step
    ema.safetensors          averaged weights
    objective.safetensors    learned parts of the losses
    checkpoints/step_N/      everything needed to resume
    metrics.jsonl            one line for each report of the trainer
    scores.json              scores of the validation split after the last step
    samples/                 pictures made during training
    released.json            for a converted run: the published file it came from
    tasks/NAME/              of a joint run: all but weights, log and checkpoints of each task
    backwards/NAME/          of a joint run: the run of a task that runs the flow of another backwards

Beside these lie the files that the task writes (tokenizer, codec, scales).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.core.files import write_atomically
from crossflow.core.training.checkpoint import checkpoints
from crossflow.core.weights import WEIGHTS, joint_run
from crossflow.networks.hub import CONFIG

MANIFEST = "manifest.json"
OBJECTIVE = "objective.safetensors"
METRICS = "metrics.jsonl"
SCORES = "scores.json"
RELEASED = "released.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
PROVENANCE = (MANIFEST, OBJECTIVE, RELEASED)
"""Files that say how the weights were made; copied along when a pipeline is saved elsewhere."""


@dataclass(frozen=True)
class RunFolder:
    """A run directory, which need not exist yet.

    >>> folder = RunFolder(Path("runs/none"))
    >>> folder.config.as_posix()
    'runs/none/config.yaml'
    >>> folder.is_run, folder.has_progress, folder.last_step
    (False, False, None)
    """

    path: Path

    @property
    def config(self) -> Path:
        """The file of the complete configuration."""
        return self.path / CONFIG

    @property
    def root(self) -> Path:
        """Where weights, log and checkpoints lie: the folder itself, or the joint run of which it is a task."""
        return joint_run(self.path) or self.path

    @property
    def is_run(self) -> bool:
        """Whether a run was prepared here."""
        return self.config.is_file()

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, newest first; of a task those of its joint run."""
        return checkpoints(self.root / CHECKPOINTS)

    @property
    def last_step(self) -> int | None:
        """Completed optimizer steps of the newest checkpoint; None without one."""
        newest = next(iter(self.checkpoints), None)
        return None if newest is None else int(newest.name.removeprefix("step_"))

    @property
    def has_progress(self) -> bool:
        """Whether training has written anything: weights, a checkpoint, or a line of metrics."""
        metrics = self.path / METRICS
        written = metrics.is_file() and metrics.stat().st_size > 0
        return written or bool(self.checkpoints) or any((self.path / name).is_file() for name in WEIGHTS.values())

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty when it is missing or damaged, since a run works without it."""
        return _read_json(self.path / MANIFEST)

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        """Replaces the manifest."""
        write_atomically(self.path / MANIFEST, json.dumps(content, indent=1))

    def read_scores(self) -> dict[str, Any]:
        """`scores`, `intervals`, `baseline` and the `step` they were measured at; empty when there are none."""
        return _read_json(self.path / SCORES)

    def write_scores(self, content: Mapping[str, Any]) -> None:
        """Replaces the scores."""
        write_atomically(self.path / SCORES, json.dumps(content, indent=1))

    def sample_file(self, name: str) -> Path:
        """The file of a picture made during training; makes its folder."""
        (self.path / SAMPLES).mkdir(exist_ok=True)
        return self.path / SAMPLES / name

    def snapshot(self) -> "Snapshot":
        """The present content, to be restored when a new run fails before it trains."""
        entries = frozenset(self.path.iterdir()) if self.path.is_dir() else frozenset()
        missing = tuple(path for path in (self.path, *self.path.parents) if not path.exists())
        return Snapshot(self, entries, missing)


@dataclass(frozen=True)
class Snapshot:
    """The state of a folder before a run was prepared in it.

    `entries` existed; `missing` did not: the folder itself and its parents, innermost first.
    """

    folder: RunFolder
    entries: frozenset[Path]
    missing: tuple[Path, ...]

    def restore(self) -> None:
        """Removes everything added since, unless training has written something. Keeps all that existed before."""
        if self.folder.has_progress or not self.folder.path.is_dir():
            return
        for path in set(self.folder.path.iterdir()) - self.entries:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for path in self.missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def new_folder(root: Path, name: str) -> Path:
    """root/name, or root/name-2, root/name-3, ... when that exists."""
    folder, number = root / name, 1
    while folder.exists():
        number += 1
        folder = root / f"{name}-{number}"
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
