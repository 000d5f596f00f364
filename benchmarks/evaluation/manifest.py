"""The manifest of an evaluation: everything its numbers depend on, and when and where they were measured."""

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossflow.benchmarks.evaluation.plan import Plan
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core import distributed
from crossflow.core.config import SampleConfig
from crossflow.core.sampling import count_evaluations
from crossflow.core.weights import WEIGHTS, joint_run, weights_file
from crossflow.engine.provenance import environment, versions
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
"""Sampling settings that determine the number of network evaluations."""
SUFFIXES = {".safetensors", ".yaml", ".json", ".txt", ".model"}
FOLDERS = {"checkpoints", "samples", "evaluation"}
UNUSED = {"manifest.json", "metrics.jsonl", "scores.json", "objective.safetensors"}
"""Folders and files of a run that sampling does not read, unless the task's parts name them."""


def identity(
    pipe: Pipeline, plan: Plan, protocol: Protocol | None, sampling: SampleConfig, *, seed: int, num: int
) -> dict[str, Any]:
    """Everything that decides the numbers: data, model, sampling, protocol. Times and machines are not part of it."""
    cases = plan.cases
    return {
        "task": pipe.task.name,
        "protocol": None if protocol is None else protocol.model_dump(mode="json"),
        "checkpoint": str(pipe.folder),
        "checksums": checksums(pipe),
        "weights": pipe.weights,
        "guided_by": pipe.guided_by,
        **({"adapters": pipe.adapters} if pipe.adapters else {}),
        "data": {"spec": cases.spec, "split": cases.split, "fingerprint": cases.fingerprint()},
        "num": num,
        "image_size": pipe.task.config.data.image_size,
        "resize": plan.scoring.resize,
        "sample": sampling.model_dump(mode="json"),
        "evaluations": count_evaluations(**sampling.model_dump(include=SAMPLING_COST)),
        "seed": seed,
        **arithmetic(pipe.model, pipe.precision),
    }


def arithmetic(model: nn.Module, precision: str) -> dict[str, Any]:
    """The precision of matrix products and, if it is another, of the weights; and whether a GPU multiplies float32
    matrices in TF32.
    """
    types = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
    weights = "" if types == ["float32"] else f", weights in {' and '.join(types)}"
    tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return {"precision": f"{precision}{weights}", "tf32": tf32}


def checksums(pipe: Pipeline) -> dict[str, str]:
    """SHA-256 of the run's files that sampling reads; for a model that was never saved, of its weights."""
    if pipe.folder is None:
        return {"model": weights_checksum(pipe.model)}
    weights = set(WEIGHTS.values()) - {WEIGHTS[pipe.weights]}
    unused = (UNUSED | weights) - set(pipe.task.parts.files())
    digests = {}
    if joint_run(pipe.folder) is not None:
        with weights_file(pipe.folder, pipe.weights).open("rb") as file:
            digests[WEIGHTS[pipe.weights]] = hashlib.file_digest(file, "sha256").hexdigest()
    for path in sorted(pipe.folder.rglob("*")):
        name = path.relative_to(pipe.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not path.is_file() or hidden or name.parts[0] in FOLDERS | unused or path.suffix not in SUFFIXES:
            continue
        if not any((folder / "items.jsonl").is_file() for folder in path.parents):  # an evaluation inside the run
            with path.open("rb") as file:
                digests[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def items(ids: Sequence[str], bad: Mapping[str, str]) -> dict[str, Any]:
    """What was scored: ids in order, and the reasons why other items were not."""
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return {"num_items": len(ids), "ids": {"sha256": digest, "first": list(ids[:3])}, "bad_items": dict(bad)}


def circumstances(started: float, device: torch.device) -> dict[str, Any]:
    """Time, duration and machine of an evaluation that started at `started` (seconds since 1970) and ends now."""
    here = environment()
    packages = {**here.pop("versions"), **versions(PACKAGES)}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "processor": _processor(),
        **here,
        "versions": packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
