"""Clocks, floating-point operations and memory of a piece of work, and what limits its speed.

Shares come from one pass under torch.profiler, seconds from passes without it.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from crossflow.core.precision import DTYPES

PRODUCT_SIDE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices whose product measures the ceiling."""
PRODUCT_ROUNDS = 7
WAITING, IDLE, PRODUCTS = 0.3, 0.3, 0.5
"""Shares of a row's time from which it is called bound by data, by launches, by matrix products; see `Shares.bound`."""
# Operators whose time counts as matrix products: dense and batched products, convolutions, attention kernels.
OPERATORS = ("aten::", "mkldnn::", "onednn::")
PRODUCT_WORDS = ("mm", "conv", "attention", "linear_pointwise")


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """Seconds of named phases, added up until `take`. The device is waited for at the end of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose time is added to that of the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def around(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """`action` as a phase."""

        def timed(*args: object, **options: object) -> Any:
            with self.phase(name):
                return action(*args, **options)

        return timed

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds by the clock that one call takes, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each name over the rounds; a name that a round lacks counts as 0 there."""
    names = dict.fromkeys(name for seconds in rounds for name in seconds)
    return {name: statistics.median(seconds.get(name, 0.0) for seconds in rounds) for name in names}


def ceiling(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of a large matrix product in this precision, a median, measured now."""
    side = PRODUCT_SIDE.get(device.type, 2048)
    dtype = DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rounds = [seconds_of(lambda: a @ b, device) for _ in range(2 + PRODUCT_ROUNDS)]
    return 2 * side**3 / statistics.median(rounds[2:])


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Context in which torch counts operations; compiled code runs uncompiled, since its kernels are not counted."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        yield counter


def reset_peak(device: torch.device) -> None:
    """Restarts the measurement of the largest memory use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The largest memory use since `reset_peak`: allocated on a GPU, otherwise resident in the whole process (outside
    Linux since it started; 0 on Windows, which does not say).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Shares:
    """Shares of a piece of work's time, in [0, 1]."""

    products: float
    """Of the device's time: matrix products, convolutions and attention."""
    idle: float
    """The device waits for the host: no kernel runs on a GPU; no operator runs on a CPU."""
    data: float = 0.0
    """The loop waits for data."""

    def bound(self) -> str:
        """In words what limits the speed: the first of data, launches and matrix products above its threshold; else
        memory traffic, the rest of the device's time.
        """
        if self.data >= WAITING:
            return f"data: the loop waits for them {self.data:.0%} of the time"
        if self.idle >= IDLE:
            return (
                f"launch overhead: the device waits for the host (Python, launches, files) {self.idle:.0%} of the time"
            )
        if self.products >= PRODUCTS:
            return f"matrix products: {self.products:.0%} of the device's time"
        return f"memory traffic: {1 - self.products:.0%} of the device's time is neither products nor attention"


def profiled(action: Callable[[], object], device: torch.device) -> tuple[Shares, list[tuple[str, float]]]:
    """The shares of `action`, without those of data, and its ten longest operators with their shares."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities, acc_events=True) as trace:
        start = time.perf_counter()
        action()
        synchronize(device)
        wall = 1e6 * (time.perf_counter() - start)
    busy: dict[str, float] = {}
    for event in trace.key_averages():
        # Kernels have rows of their own beside those of their operators; those of compiled code have no other.
        if event.key.startswith(OPERATORS) and event.device_type == torch.autograd.DeviceType.CPU:
            busy[event.key] = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        elif event.key.startswith("triton") if on_gpu else "Compiled" in event.key:
            seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            busy[event.key] = max(busy.get(event.key, 0.0), seconds)
    total = sum(busy.values())
    products = sum(value for name, value in busy.items() if any(word in name for word in PRODUCT_WORDS))
    longest = sorted(busy.items(), key=lambda item: -item[1])[:10]
    shares = Shares(products / max(total, 1e-9), max(0.0, 1 - total / wall))
    return shares, [(name, round(value / max(total, 1e-9), 4)) for name, value in longest]
