"""Losses, times and flags of each step, measured without making the host wait for the device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossflow.core import distributed


@dataclass(frozen=True)
class Interval:
    """The steps since the last log."""

    means: dict[str, float]
    """Losses, `grad_norm` and `unconditional` (share of unconditional samples), averaged over ranks and steps, but
    for bad ones.
    """
    num_steps: int
    """Steps in the time below; fewer than in the means when the run was resumed meanwhile."""
    seconds: float
    cpu_seconds: float
    """Processor time of all threads of this process in these."""
    waiting: float
    """Seconds of these in which the process waited for its data."""


class Meter:
    """Sums of the losses, the gradient norm and the share of unconditional samples since the last log, on the device,
    and the elapsed time.
    """

    EXTRA = ("grad_norm", "unconditional")
    """The sums beside those of the losses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._num_steps = 0  # in the sums, and the steps left out
        self._left_out = torch.zeros((), device=device)  # number of bad steps
        self.restart_clock()

    def add(self, names: tuple[str, ...], losses: Tensor, norm: Tensor, unconditional: Tensor, is_bad: Tensor) -> None:
        """Adds a step: its losses (P,), called `names`, its gradient norm and its share of unconditional samples.

        is_bad: whether to leave the step out of the means. All but the losses are scalars.
        """
        self.names = names
        values = torch.cat([losses, norm.view(1).to(losses), unconditional.view(1).to(losses)])
        values = torch.where(is_bad, 0, values)
        self._sums = values if self._sums is None else self._sums + values
        self._left_out = self._left_out + is_bad
        self._num_steps += 1
        self._num_timed += 1

    def take(self) -> Interval:
        """The interval that ends here; starts the next one."""
        seconds, cpu_seconds = time.monotonic() - self._start, time.process_time() - self._cpu_start
        interval = Interval(self._means(), self._num_timed, seconds, cpu_seconds, self._waiting)
        self._sums, self._num_steps, self._left_out = None, 0, torch.zeros_like(self._left_out)
        self.restart_clock()
        return interval

    def _means(self) -> dict[str, float]:
        assert self._sums is not None
        sums = distributed.mean_over_ranks(self._sums).cpu().double()  # not every device has float64
        values = sums / (self._num_steps - self._left_out.item())
        return dict(zip([*self.names, *self.EXTRA], values.tolist(), strict=True))

    def restart_clock(self) -> None:
        """Restarts the time measurement."""
        self._start, self._cpu_start = time.monotonic(), time.process_time()
        self._num_timed, self._waiting = 0, 0.0  # steps since then, and seconds of waiting for data

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the process waits for its data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waiting += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is not counted."""
        start, cpu_start = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self._start += time.monotonic() - start
            self._cpu_start += time.process_time() - cpu_start

    def state(self) -> dict[str, Any]:
        """The current interval in JSON types; the same on every rank."""
        sums = None if self._sums is None else distributed.mean_over_ranks(self._sums).tolist()
        left_out = int(self._left_out.item())
        return {"names": list(self.names), "sums": sums, "num_steps": self._num_steps, "left_out": left_out}

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Continues the interval that `state` returned."""
        self.names = tuple(content["names"])
        if content["sums"] is not None:
            missing = len(self.names) + len(self.EXTRA) - len(content["sums"])  # of a run that recorded fewer numbers
            self._sums = torch.tensor([*content["sums"], *[float("nan")] * missing], device=self.device)
        self._num_steps = content["num_steps"]
        self._left_out.fill_(content.get("left_out", 0))


class Flags:
    """Flags on which all ranks agree after each step, read without making the host wait for a busy GPU.

    A row is (reason to stop, is loss 0 not finite, ..., is the gradient norm not finite), maximised over ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def post(self, step: int, reason: int, bad: Tensor, now: bool) -> list[tuple[int, list[float]]]:
        """Adds the row of `step` and returns the readable rows: on a GPU, unless `now`, only those of earlier steps."""
        row = torch.cat([torch.full((1,), float(reason), device=self.device), bad.float()])
        row = distributed.max_over_ranks(row)
        if self.device.type == "cuda":
            host = torch.empty(row.shape, pin_memory=True)
            host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, host, event))
        else:
            self._pending.append((step, row, None))
            now = True
        num_ready = len(self._pending) if now else len(self._pending) - 1
        ready, self._pending = self._pending[:num_ready], self._pending[num_ready:]
        rows = []
        for at, values, done in ready:
            if done is not None:
                done.synchronize()
            rows.append((at, values.tolist()))
        return rows
