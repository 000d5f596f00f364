"""The machine: Python, torch, devices with their memory, Java, optional packages, disks."""

import importlib.util
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from crossflow.core.files import size_in_words, user_cache
from crossflow.engine.health.finding import Finding

OPTIONAL = {
    "h5py": "reads NYU Depth V2's labelled file and Hypersim (extra hdf5)",
    "imageio_ffmpeg": "writes MP4 of crossflow interpolate (extra video)",
    "peft": "trains adapters of crossflow finetune (extra finetune)",
    "gradio": "shows the web page (extra demo)",
    "tensorboard": "shows curves in a browser (train.trackers=[tensorboard])",
    "wandb": "sends curves to Weights & Biases (train.trackers=[wandb])",
}
"""Module -> what it is for."""
REQUIRED = ("accelerate", "transformers", "diffusers", "datasets", "evaluate", "safetensors", "pycocoevalcap", "timm")
LOW_DISK = 2 * 10**9
"""Free bytes below which a disk is reported."""


@dataclass(frozen=True)
class Device:
    """A device that can train, with its memory in bytes; `total` is infinite where the system does not say, `free` is
    None where it cannot be asked for.
    """

    name: str
    total: float
    free: int | None
    bf16: bool
    """Whether it multiplies in bfloat16 in hardware."""

    def __str__(self) -> str:
        free = "" if self.free is None else f", {size_in_words(self.free)} free"
        total = size_in_words(int(self.total)) if math.isfinite(self.total) else "memory unknown"
        return f"{self.name}: {total}{free}, bf16 in {'hardware' if self.bf16 else 'software'}"


def devices() -> list[Device]:
    """The devices of this machine, that which a training takes first."""
    listed = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        listed.append(Device(f"cuda:{index} {torch.cuda.get_device_name(index)}", total, free, bf16))
    if torch.backends.mps.is_available():
        listed.append(Device("mps", torch.mps.recommended_max_memory(), None, True))
    return [*listed, _cpu()]


def _cpu() -> Device:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    flags = _cpu_flags()
    return Device(f"cpu, {_num_cores()} cores", total, _available(), bool({"avx512_bf16", "amx_bf16"} & flags))


def _num_cores() -> int:
    """Those that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _available() -> int | None:
    """Memory available without swapping, in bytes; None where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def java_version() -> str | None:
    """The first line of `java -version`; None without Java."""
    if shutil.which("java") is None:
        return None
    try:
        answer = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (answer.stderr + answer.stdout).splitlines()
    return lines[0] if answer.returncode == 0 and lines else None


def disks() -> dict[str, Path]:
    """What is written where: runs, the cache of this package, and that of the hub."""
    hub = os.environ.get("HF_HOME") or user_cache().parent / "huggingface"
    return {"runs": Path("runs"), "cache": user_cache(), "hub cache": Path(hub)}


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, or would hold it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def facts() -> dict[str, str]:
    """What the machine is, by subject."""
    described = {"python": platform.python_version(), "torch": torch.__version__}
    for number, device in enumerate(devices()):
        described[f"device {number}"] = str(device)
    described["java"] = java_version() or "none: METEOR and SPICE of captions are left out"
    for name, path in disks().items():
        described[name] = f"{path}: {size_in_words(free_bytes(path))} free"
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            described[module] = f"not installed; it {purpose}"
    return described


def examine_machine() -> list[Finding]:
    """What is wrong with the machine."""
    return [*_packages(), *_full_disks(disks())]


def _packages() -> Iterator[Finding]:
    missing = [module for module in REQUIRED if importlib.util.find_spec(module) is None]
    if missing:
        yield Finding(
            "packages",
            f"Packages that crossflow needs are not installed: {', '.join(missing)}.",
            "Install crossflow again, with its requirements: pip install -e .",
        )


def _full_disks(places: Mapping[str, Path]) -> Iterator[Finding]:
    for name, path in places.items():
        if (free := free_bytes(path)) < LOW_DISK:
            yield Finding(
                "disk",
                f"The disk of {path} ({name}) has {size_in_words(free)} left.",
                "Free some space before training: a checkpoint that does not fit ends the run.",
                "warning",
            )
