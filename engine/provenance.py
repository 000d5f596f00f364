"""The provenance of a run (data, command, environment) as its manifest records it, and the way back to its data.

Specs of data are kept as the user wrote them. Relative paths refer to the directory in which the run was started, which
is searched when a path does not exist in the current directory.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.data.dataset import Examples
from crossflow.engine.folder import MANIFEST, RunFolder
from crossflow.tasks.base import Task

PACKAGES = ("crossflow-toolkit", "torch", "accelerate", "transformers", "diffusers", "numpy")


def manifest(config: Config, data: Examples) -> dict[str, Any]:
    """The manifest of a new run: task, command, directory, time, data, and the `environment`."""
    return {
        "task": config.task,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": describe(data),
        **environment(),
    }


def describe(data: Examples) -> dict[str, Any]:
    """A data set as a manifest records it: spec, split, number of items, fingerprint of their content."""
    reader = data.reader
    return {
        "spec": reader.spec,
        "split": reader.split,
        "num_items": len(data),
        "fingerprint": reader.fingerprint(),
    }


def environment() -> dict[str, Any]:
    """Versions of the packages that affect results, the machine, and the git revision of a checkout."""
    return {
        "versions": versions(PACKAGES),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _revision(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package, or "not installed"."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def _revision() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None  # installed, perhaps inside another project's checkout
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def open_data(
    task: type[Task],
    config: Config,
    split: str,
    spec: str | None = None,
    *,
    run: Path | None = None,
    limit: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Examples:
    """A split of the data at `spec`, by default those of the configuration; see `Task.dataset`.

    run: the run directory of the configuration, for relative paths. Raises UserError if the data cannot be read; the
    message says how to name data that have moved.
    """
    if spec is not None or run is None:
        return task.dataset(config, split, spec, limit=limit, options=options)
    directory = RunFolder(run).read_manifest().get("directory")
    base = Path(directory) if isinstance(directory, str) else None
    try:
        return task.dataset(config, split, limit=limit, base=base, options=options)
    except UserError as error:
        origin = f", with relative paths from {directory}" if directory else ""
        raise UserError(
            f"{error} The configuration of the run in {run} names these data{origin}. If they have moved, "
            "give their place: `crossflow evaluate --data SPEC`, or, to resume a run, "
            "`crossflow train --resume auto --data SPEC` (data.val=SPEC for validation data)."
        ) from error


def expect_same(folder: RunFolder, data: Examples) -> None:
    """Raises UserError if the training data have another content than at the start of the run; paths may differ."""
    before, after = folder.read_manifest().get("data", {}), describe(data)
    if before.get("fingerprint") == after["fingerprint"]:
        return
    if "fingerprint" not in before:
        raise UserError(
            f"The {MANIFEST} of {folder.path} does not describe its training data, so {after['spec']} cannot be "
            "compared with them. To accept these data as they are, resume with --data-changed."
        )
    raise UserError(
        f"The training data of the run in {folder.path} have changed: it began with {before['spec']} "
        f"({before['num_items']} items, fingerprint {before['fingerprint'][:12]}), and now reads {after['spec']} "
        f"({after['num_items']} items, {after['fingerprint'][:12]}). Everything learned from them before the flow "
        "(tokenizer, scales, a text autoencoder) would stay, and the order of the items would change. Restore the "
        "data, start a new run in another --output, or resume with --data-changed to accept the change."
    )


def changed(folder: RunFolder, data: Examples) -> dict[str, Any]:
    """The manifest of a run whose data were replaced on purpose; `earlier_data` lists the previous ones."""
    content = folder.read_manifest()
    if content.get("data", {}).get("fingerprint") == data.reader.fingerprint():
        return content
    earlier = [*content.get("earlier_data", []), content.get("data")]
    return {**content, "data": describe(data), "earlier_data": earlier}
