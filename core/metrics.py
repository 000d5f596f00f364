"""What the metrics of all tasks share: numbers per item, their aggregate, and how sure it is.

A task scores one item at a time into a row of plain numbers; the rows are what is saved, gathered over processes and
resampled. An `evaluate.Metric` turns them into the reported averages. Nothing is loaded from a hub.
"""

import math
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from crossflow.core.errors import UserError

Row = dict[str, Any]


class TaskMetric(ABC):
    """Per-item rows and their aggregate.

    Attributes:
        rows: one dict per item, in the order added: "id" and the item's numbers. A number is None where it is not
            defined for that item (no valid pixel, picture too small). Rows hold only JSON types.
        notes: sentences that belong beside the result: what was left out and why. Filled by `compute`.
    """

    names: tuple[str, ...]  # the numbers that are averaged, in the order of the table

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._ids: set[str] = set()

    @abstractmethod
    def score(self, output: Any, truth: Any) -> Row:
        """The numbers of one item, without its id."""

    def add(self, id: str, output: Any, truth: Any) -> Row:
        """Score one item and keep its row.

        Raises:
            ValueError: this id was scored before, or output and truth do not fit together; the text names the item.
        """
        if id in self._ids:
            raise ValueError(f"item {id!r} was scored before")
        try:
            row = {"id": id, **self.score(output, truth)}
        except ValueError as error:
            raise ValueError(f"item {id!r}: {error}") from error
        self.rows.append(row)
        self._ids.add(id)
        return row

    def extend(self, rows: Iterable[Row]) -> None:
        """Take over rows of other processes; ids that are here already are skipped, as padded batches repeat items."""
        for row in rows:
            if row["id"] not in self._ids:
                self.rows.append(dict(row))
                self._ids.add(row["id"])

    def replace(self, rows: Iterable[Row]) -> None:
        """Take over these rows instead of those that are here."""
        self.rows, self._ids = [], set()
        self.extend(rows)

    def compute(self) -> dict[str, float]:
        """The mean of every number over the items where it is defined, and "num_items".

        Raises:
            UserError: no items, or a number that is defined for none of them.
        """
        self._require_rows()
        self.notes = []
        columns = {name: [row[name] for row in self.rows] for name in self.names}
        for name, values in columns.items():
            undefined = sum(value is None for value in values)
            if undefined == len(values):
                raise UserError(
                    f"{name} is not defined for any of the {len(values)} items scored: "
                    "every truth is empty or too small."
                )
            if undefined:
                self.notes.append(f"{name} is not defined for {undefined} of {len(values)} items and averages the rest")
        return {**mean_metric(columns), "num_items": float(len(self.rows))}

    def intervals(
        self, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Bootstrap interval of every averaged number; those defined for fewer than two items are left out."""
        found = {}
        for name in self.names:
            values = [row[name] for row in self.rows if row.get(name) is not None]
            if len(values) >= 2:
                found[name] = bootstrap_interval(values, level=level, num_resamples=num_resamples, seed=seed)
        return found

    def _require_rows(self) -> None:
        if not self.rows:
            raise UserError("No items were scored: the data is empty, or all of its items are bad.")


def mean_metric(columns: dict[str, list[float | None]]) -> dict[str, float]:
    """Means of columns of equal length, None left out, by an `evaluate.Metric`."""
    import datasets
    import evaluate

    class RowMean(evaluate.Metric):
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description="Mean of the numbers of each item.",
                citation="",
                inputs_description="One column of numbers per name; a null is an item without that number.",
                features=datasets.Features({name: datasets.Value("float64") for name in columns}),
            )

        def _compute(self, **values: Any) -> dict[str, float]:
            return {
                name: math.fsum(kept) / len(kept) if (kept := [v for v in column if v is not None]) else math.nan
                for name, column in values.items()
            }

    return run_metric(RowMean, **columns)


def run_metric(kind: type, **columns: Sequence[Any]) -> dict[str, float]:
    """Make an `evaluate.Metric` of this class and compute it on whole columns.

    Data stays in memory. The folder that `evaluate` insists on is a temporary one, so processes on one machine do not
    meet and nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="crossflow-metric-") as folder:
        metric = kind(keep_in_memory=True, cache_dir=folder, experiment_id=uuid.uuid4().hex, seed=0)
        return metric.compute(**columns)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979): items are drawn again with replacement.

    Args:
        values: one number per item, at least two.
        level: share of resampled means inside the interval, in (0, 1).
        num_resamples: how many times the items are drawn again.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (low, high)
    """
    numbers = np.asarray(values, dtype=np.float64)
    means = [numbers[chosen].mean(axis=1) for chosen in resamples(len(numbers), num_resamples, seed)]
    return percentile_interval(np.concatenate(means).tolist(), level)


def resamples(num_items: int, num_resamples: int, seed: int) -> Iterable[np.ndarray]:
    """Item indices drawn with replacement, `num_resamples` rows in all, in arrays (rows, num_items) of bounded size."""
    if num_items < 2:
        raise ValueError(f"a bootstrap needs at least two items, got {num_items}")
    random = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // num_items)
    for done in range(0, num_resamples, rows):
        yield random.integers(0, num_items, (min(rows, num_resamples - done), num_items))


def percentile_interval(statistics: Sequence[float], level: float) -> tuple[float, float]:
    """The middle `level` of the statistics, as (low, high)."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    low, high = np.quantile(np.asarray(statistics, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
