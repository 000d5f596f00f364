"""What a number was made of, so that it can be made again, and what differs between two numbers."""

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crossflow.benchmarks.evaluation.plan import Plan
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core.config import SampleConfig
from crossflow.core.sampling import count_evaluations
from crossflow.engine.folder import WEIGHTS
from crossflow.engine.provenance import environment
from crossflow.engine.sample import Pipeline
from crossflow.networks.frozen import weights_checksum

PACKAGES = (
    "torchvision",
    "timm",
    "torchmetrics",
    "torch-fidelity",
    "scikit-image",
    "pycocoevalcap",
    "pillow",
    "kornia",
)
SAMPLING_COST = {"solver", "steps", "guidance", "guidance_interval", "zero_init", "time_grid"}
"""Settings of the sampling on which the number of network evaluations depends."""


def identity(
    pipe: Pipeline, work: Plan, protocol: Protocol | None, chosen: SampleConfig, *, seed: int, num: int
) -> dict[str, Any]:
    """Everything that decides the numbers: data, model, sampling, protocol. Times and machines stand elsewhere."""
    cases = work.cases
    data = {"spec": cases.spec, "split": cases.split, "fingerprint": cases.fingerprint()}
    return {
        "task": pipe.task.name,
        "protocol": None if protocol is None else protocol.model_dump(mode="json"),
        "checkpoint": str(pipe.folder),
        "checksums": checksums(pipe),
        "weights": pipe.weights,
        "guided_by": pipe.guided_by,
        "data": data,
        "num": num,
        "image_size": pipe.task.config.data.image_size,
        "resize": work.scoring.resize,
        "sample": chosen.model_dump(mode="json"),
        "evaluations": count_evaluations(**chosen.model_dump(include=SAMPLING_COST)),
        "seed": seed,
        "precision": "float32",
    }


def checksums(pipe: Pipeline) -> dict[str, str]:
    """SHA-256 of the run's files that sampling reads; of a model that was never saved, that of its weights."""
    if pipe.folder is None:
        return {"model": weights_checksum(pipe.model)}
    kept = {WEIGHTS[pipe.weights], "config.yaml"}
    unused = (
        {*WEIGHTS.values(), "manifest.json", "metrics.jsonl", "scores.json", "objective.safetensors"}
        - kept
        - set(pipe.task.parts.files())
    )
    folders = {"checkpoints", "samples", "evaluation"}
    found = {}
    for path in sorted(pipe.folder.rglob("*")):
        name = path.relative_to(pipe.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not path.is_file() or hidden or name.parts[0] in folders | unused or path.suffix not in SUFFIXES:
            continue
        if not any((folder / "items.jsonl").is_file() for folder in path.parents):  # an evaluation that lies in the run
            with path.open("rb") as file:
                found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


SUFFIXES = {".safetensors", ".yaml", ".json", ".txt", ".model"}


def complete(
    about: Mapping[str, Any], *, ids: Sequence[str], bad: Mapping[str, str], networks: Mapping[str, str], begun: float,
    seconds: float, processes: int, real: Mapping[str, Any] | None, device: torch.device, moved: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished evaluation: `about` of `identity`, what was scored, and where and when it ran."""
    here = environment()
    versions = {**here.pop("versions"), **{name: _version(name) for name in PACKAGES}}
    return {
        **about,
        "num_items": len(ids),
        "ids": {"sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(), "first": list(ids[:3])},
        "bad_items": dict(bad),
        "networks": dict(networks),
        "real_statistics": None if real is None else dict(real),
        "set": list(moved),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "seconds": round(seconds, 2),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "processor": _processor(),
        **here,
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
