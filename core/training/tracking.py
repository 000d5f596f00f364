"""The record of a training: json lines, and the trackers that receive the same numbers.

`metrics.jsonl` has one object per line with `kind` (train, val, sample), `step` (completed optimizer steps) and
numbers.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import write_atomically

# Tracker -> the modules that it needs, any of which suffices.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


class MetricsFile:
    """Appends JSON lines, each synced to disk before the next; lines after a step can be removed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line; NaN and infinities become null. Raises UserError on a full disk."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). Checkpoints are untouched. Make room or choose "
                "another --output, then continue with --resume auto."
            ) from error

    def truncate(self, step: int) -> dict[str, dict[str, Any]]:
        """Keeps the lines up to `step`, so that a resumed run repeats none; returns the last of each kind.

        An unfinished last line is removed too.
        """
        if not self.path.exists():
            return {}
        lines = [(text, _parse(text)) for text in self.path.read_text(encoding="utf-8").splitlines()]
        kept = [(text, line) for text, line in lines if line is not None and line["step"] <= step]
        write_atomically(self.path, "".join(text + "\n" for text, _ in kept))
        return {line["kind"]: line for _, line in kept}


def _parse(text: str) -> dict[str, Any] | None:
    """The content of a line, or None when it is not a valid line of metrics.jsonl."""
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], int) and isinstance(line["kind"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError unless every named tracker is known and its package is installed."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if not any(importlib.util.find_spec(module) for module in TRACKERS[name]):
            raise UserError(
                f"train.trackers names {name}, whose package is not installed. Run `pip install "
                f"{TRACKERS[name][0]}`, or leave it out: metrics.jsonl is always written."
            )
