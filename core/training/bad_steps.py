"""Steps whose loss or gradient is not finite. The learner leaves them out of the weights; here they are counted and
listed, and too many in a row end the training.

`bad_steps.jsonl` has one line for each: the step, and for each process its losses, gradient norm and the ids of its
items.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossflow.core import distributed
from crossflow.core.training.learner import StepResult
from crossflow.core.training.tracking import MetricsFile

BAD_STEPS = "bad_steps.jsonl"
NUM_IDS = 8
"""Items named in messages."""
_NUM_RECENT = 3  # a GPU's steps are judged one step later


@dataclass(frozen=True)
class BadStep:
    """A step that was left out."""

    step: int
    names: list[str]
    """What was not finite: names of losses, or `gradient norm`."""
    ids: list[str]
    """Items of the batch, of all processes; empty on all processes but the first."""

    def describe(self) -> str:
        """What was not finite in which items, in words."""
        names = [name for name in self.names if name not in ("loss", "gradient norm")] or self.names
        more = f" and {len(self.ids) - NUM_IDS} more" if len(self.ids) > NUM_IDS else ""
        items = f", in a batch of {', '.join(self.ids[:NUM_IDS])}{more}" if self.ids else ""
        return f"not finite (NaN or infinity): {', '.join(names)}{items}"


class BadSteps:
    """The bad steps of a run: `total`, and how many came `in_a_row` up to the last step."""

    def __init__(self, run_dir: Path) -> None:
        self.file = MetricsFile(run_dir / BAD_STEPS)
        self.total = self.in_a_row = 0
        self._recent: deque[tuple[int, StepResult, list[str]]] = deque(maxlen=_NUM_RECENT)

    def remember(self, step: int, result: StepResult, ids: Iterable[str]) -> None:
        """Remembers a step until it is judged."""
        self._recent.append((step, result, list(ids)))

    @property
    def latest(self) -> Tensor:
        """Which numbers of the last step are not finite, see `StepResult.is_bad`."""
        return self._recent[-1][1].is_bad

    def judge(self, step: int, names: Sequence[str]) -> BadStep | None:
        """Counts a step: a bad one is written to the file and returned.

        names: what was not finite, the same on all ranks, each of which must call this.
        """
        if not names:
            self.in_a_row = 0
            return None
        self.total += 1
        self.in_a_row += 1
        result, ids = next((result, ids) for at, result, ids in self._recent if at == step)
        own: dict[str, Any] = {"losses": _values(result.names, result.losses.tolist())}
        processes = distributed.on_first([{**own, "grad_norm": _value(result.norm.item()), "ids": ids}])
        if distributed.is_main():
            self.file.append({"kind": "bad", "step": step, "not_finite": list(names), "processes": processes})
        return BadStep(step, list(names), [id for process in processes for id in process["ids"]])

    def state(self) -> list[int]:
        """The counts, as JSON."""
        return [self.total, self.in_a_row]

    def load_state(self, counts: Sequence[int]) -> None:
        """The inverse of `state`."""
        self.total, self.in_a_row = counts


def _value(number: float) -> float | str:
    """A number as JSON, which has neither NaN nor infinities."""
    return number if math.isfinite(number) else str(number)


def _values(names: Sequence[str], numbers: Sequence[float]) -> dict[str, Any]:
    return {name: _value(number) for name, number in zip(names, numbers, strict=True)}
