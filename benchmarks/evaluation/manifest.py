"""What a number was made of, so that it can be made again, and what differs between two numbers."""

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crossflow.benchmarks.evaluation.plan import Cases
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.sampling import count_evaluations
from crossflow.core.settings import flat
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
    pipe: Pipeline, cases: Cases, protocol: Protocol | None, chosen: SampleConfig, *, seed: int, num: int
) -> dict[str, Any]:
    """Everything that decides the numbers: data, model, sampling, protocol. Times and machines stand elsewhere."""
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
        "resize": resize(pipe, protocol),
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
    unused = {*WEIGHTS.values(), "manifest.json", "metrics.jsonl", "scores.json", "objective.safetensors"} - kept
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


def resize(pipe: Pipeline, protocol: Protocol | None) -> str:
    """In words, what is done to pictures before the model sees them."""
    side = pipe.task.config.data.image_size
    centre = f"centre square, antialiased bicubic to {side} px"
    if pipe.task.name == "sr":
        return "cut to multiples of the scale, MATLAB's bicubic reduction, tiles of the enlarged picture"
    if pipe.task.name == "depth" and protocol is not None:
        return f"whole picture, shorter side to {side} px, the estimate resized back bilinearly"
    return "none: prompts" if pipe.task.name == "t2i" else centre


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


# ------------------------------------------------------------------------------------------------- read and compare


@dataclass(frozen=True)
class Evaluation:
    """A metrics.json: scores and the manifest that they stand on."""

    path: Path
    scores: dict[str, float]
    intervals: dict[str, list[float]]
    manifest: dict[str, Any]


def read_evaluation(source: str | Path) -> Evaluation:
    """The evaluation in a metrics.json or in its folder. Raises UserError when there is none."""
    path = Path(source).expanduser()
    path = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(path, content["scores"], content.get("intervals", {}), content["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no evaluation ({error}). Give the metrics.json that crossflow evaluate wrote, or its folder."
        ) from error


def options_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `crossflow evaluate` that make this evaluation again."""
    missing = [name for name in ("checkpoint", "weights", "data", "sample", "seed", "num") if name not in manifest]
    if missing:
        raise UserError(
            f"This manifest lacks {', '.join(missing)}: it is from a version that did not keep what repeating needs."
        )
    return {
        "checkpoint": manifest["checkpoint"],
        "weights": manifest["weights"],
        "seed": manifest["seed"],
        "guide_with": manifest["guided_by"],
        "moved": tuple(manifest.get("set", ())),
        "data": manifest["data"]["spec"],
        "split": manifest["data"]["split"],
        "num": manifest["num"],
    }


EQUAL = 1e-9  # one machine gives the same numbers; this is for their way through JSON


def expect_repeated(before: Evaluation, scores: Mapping[str, float], now: Mapping[str, Any]) -> str:
    """One sentence when the repeated scores are those of `before`. Raises UserError that names what differs."""
    wrong = [name for name in before.scores if not _close(before.scores[name], scores.get(name))]
    if not wrong:
        return f"The same {len(before.scores)} numbers as in {before.path}."
    told = ", ".join(f"{name} {before.scores[name]:.6g} -> {_number(scores.get(name))}" for name in wrong[:6])
    causes = [line for lines in differences(before.manifest, now).values() for line in lines]
    why = f" What differs: {'; '.join(causes[:8])}." if causes else " Nothing that the manifests name differs."
    raise UserError(f"{len(wrong)} of {len(before.scores)} numbers are not those of {before.path}: {told}.{why}")


def _close(a: float, b: float | None) -> bool:
    return b is not None and (a == b or abs(a - b) <= EQUAL * max(1.0, abs(a)))


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


GROUPS = {
    "measured differently, so the numbers do not compare": (
        "task", "protocol", "data.fingerprint", "data.split", "ids.sha256", "num", "num_items", "networks",
        "real_statistics", "bad_items",
    ),
    "another model, or used otherwise": (
        "checksums", "weights", "guided_by", "image_size", "resize", "sample", "evaluations", "seed",
        "precision", "set",
    ),
    "should not matter": (),
}  # fmt: skip
IGNORED = (
    "started", "seconds", "ids.first", "data.spec", "protocol.networks", "protocol.notes", "protocol.title",
    "protocol.layout", "protocol.headline",
)  # fmt: skip
"""What says nothing about the numbers, or nothing that a checksum does not say better."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    """What two manifests say differently, by what it means for their numbers: `name: ours -> theirs`."""
    ours, theirs = flat(a), flat(b)
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) == theirs.get(name) or _is(name, IGNORED):
            continue
        group = next((group for group, names in GROUPS.items() if _is(name, names)), "should not matter")
        found[group].append(f"{name}: {_told(ours, name)} -> {_told(theirs, name)}")
    return {group: lines for group, lines in found.items() if lines}


def _is(name: str, names: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _told(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "not there"
    return text if len(text) <= 60 else f"{text[:57]}..."


def score_rows(a: Evaluation, b: Evaluation) -> list[tuple[str, float, float, str]]:
    """(name, ours, theirs, what their 95 % intervals say) for every number that both have."""
    rows = []
    for name, value in a.scores.items():
        if name not in b.scores:
            continue
        word = "equal" if _close(value, b.scores[name]) else ""
        if not word and name in a.intervals and name in b.intervals:
            (low, high), (other_low, other_high) = a.intervals[name], b.intervals[name]
            word = "intervals overlap" if low <= other_high and other_low <= high else "intervals apart"
        rows.append((name, value, b.scores[name], word))
    return rows
