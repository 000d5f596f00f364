"""Scores as the rows of a table: each with its interval and what a trivial output, or a control, scores.

A control is a score called `shuffled_NAME`: the outputs judged against the truth of other items. It stands beside NAME
as a baseline does, not as a result in its own right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONTROL = "shuffled_"


@dataclass(frozen=True)
class ScoreRow:
    """One score. `baseline` is that of the trivial output or, where there is none, of the shuffled control."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    baseline: float | None = None
    is_controlled: bool = False
    """Whether `baseline` is that of the control."""


def score_rows(
    scores: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]] | None = None,
    baseline: Mapping[str, float] | None = None,
) -> list[ScoreRow]:
    """One row per score in their order, controls moved into the baseline column of the score that they control.

    >>> [(row.name, row.baseline) for row in score_rows({"colors": 0.9, "shuffled_colors": 0.1})]
    [('colors', 0.1)]
    """
    rows = []
    for name, value in scores.items():
        if is_control(name, scores):
            continue
        low_high = (intervals or {}).get(name)
        interval = (float(low_high[0]), float(low_high[1])) if low_high is not None else None
        trivial, control = (baseline or {}).get(name), scores.get(CONTROL + name)
        is_controlled = trivial is None and control is not None
        rows.append(ScoreRow(name, value, interval, control if is_controlled else trivial, is_controlled))
    return rows


def is_control(name: str, scores: Mapping[str, float]) -> bool:
    """Whether a score is the shuffled control of another one."""
    return name.startswith(CONTROL) and name.removeprefix(CONTROL) in scores
