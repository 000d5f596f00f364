"""The base of all tasks' metrics: numbers per item, their averages, and the averages' confidence intervals.

A task scores one item at a time into a row of plain numbers; rows are saved, gathered over processes and resampled. An
`evaluate.Metric` averages them. Nothing is loaded from a hub.
"""

import math
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from crossflow.core.errors import UserError
from crossflow.core.intervals import bootstrap_interval, wilson_interval

Row = dict[str, Any]
"""An item's id and numbers, of JSON types; None where a number is undefined for the item."""
Output = TypeVar("Output")
Truth = TypeVar("Truth")


class TaskMetric(ABC, Generic[Output, Truth]):
    """Scores outputs against truths item by item, and averages the scores.

    >>> class Error(TaskMetric[float, float]):
    ...     names = ("error",)
    ...     def score(self, output, truth):
    ...         return {"error": abs(output - truth)}
    >>> metric = Error()
    >>> metric.add("a", 1.0, truth=2.0), metric.add("b", 5.0, truth=2.0)
    ({'id': 'a', 'error': 1.0}, {'id': 'b', 'error': 3.0})
    >>> metric.compute()
    {'error': 2.0, 'num_items': 2.0}

    Attributes:
        names: the numbers that are averaged, in the order of the table.
        rows: one dict per item, in the order added: "id" and the item's numbers. A number is None where it is undefined
            for the item (no valid pixel, picture too small).
        notes: sentences to print beside the result, such as what was left out and why. Filled by `compute`.
    """

    names: tuple[str, ...]

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._ids: set[str] = set()

    @abstractmethod
    def score(self, output: Output, truth: Truth) -> Row:
        """The numbers of one item, without its id."""

    def score_all(self, outputs: Sequence[Output], truths: Sequence[Truth]) -> Iterator[Row]:
        """The rows of several items. A metric whose judge is a network overrides it to judge them in one batch."""
        return map(self.score, outputs, truths)

    def add(self, id: str, output: Output, truth: Truth) -> Row:
        """Score an item and keep its row; see `add_all`."""
        (row,) = self.add_all([id], [output], [truth])
        return row

    def add_all(self, ids: Sequence[str], outputs: Sequence[Output], truths: Sequence[Truth]) -> list[Row]:
        """Score items together and keep their rows.

        Raises:
            ValueError: an id has already been scored, or output and truth do not match; the message names the item.
        """
        scored, added = iter(self.score_all(outputs, truths)), []
        for id in ids:
            if id in self._ids:
                raise ValueError(f"item {id!r} has already been scored")
            try:
                row = {"id": id, **next(scored)}
            except ValueError as error:
                raise ValueError(f"item {id!r}: {error}") from error
            self.rows.append(row)
            self._ids.add(id)
            added.append(row)
        return added

    def extend(self, rows: Iterable[Row]) -> None:
        """Append rows of other processes; rows of scored ids are skipped, because padded batches repeat items."""
        for row in rows:
            if row["id"] not in self._ids:
                self.rows.append(dict(row))
                self._ids.add(row["id"])

    def replace(self, rows: Iterable[Row]) -> None:
        """Keep these rows instead of the present ones."""
        self.rows, self._ids = [], set()
        self.extend(rows)

    def compute(self) -> dict[str, float]:
        """The mean of each number over the items where it is defined, and "num_items".

        Raises:
            UserError: there are no items, or a number is defined for none of them.
        """
        self._require_rows()
        self.notes = []
        columns = {name: [row[name] for row in self.rows] for name in self.names}
        for name, values in columns.items():
            undefined = sum(value is None for value in values)
            if undefined == len(values):
                raise UserError(
                    f"{name} is undefined for all {len(values)} scored items: every truth is empty or too small."
                )
            if undefined:
                self.notes.append(f"{name} is undefined for {undefined} of {len(values)} items and averages the others")
        return {**mean_metric(columns), "num_items": float(len(self.rows))}

    def intervals(
        self, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Confidence interval of each average, defined for at least two items.

        Wilson's for numbers that are all 0 or 1, since it has positive width even if all are equal; else a bootstrap.
        """
        bounds: dict[str, tuple[float, float]] = {}
        for name in self.names:
            values = [row[name] for row in self.rows if row.get(name) is not None]
            if len(values) < 2:
                continue
            if all(value in (0, 1) for value in values):
                bounds[name] = wilson_interval(int(sum(values)), len(values), level)
            else:
                bounds[name] = bootstrap_interval(values, level=level, num_resamples=num_resamples, seed=seed)
        return bounds

    def _require_rows(self) -> None:
        if not self.rows:
            raise UserError("No items were scored: the data is empty, or all its items are bad.")


def mean_metric(columns: dict[str, list[float | None]]) -> dict[str, float]:
    """Means of columns of equal length by an `evaluate.Metric`; None values are left out."""
    import datasets
    import evaluate

    class RowMean(evaluate.Metric):
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description="Mean of each column.",
                citation="",
                inputs_description="One column of numbers per name; a null is an item without that number.",
                features=datasets.Features({name: datasets.Value("float64") for name in columns}),
            )

        def _compute(self, **values: list[float | None]) -> dict[str, float]:
            return {
                name: math.fsum(kept) / len(kept) if (kept := [v for v in column if v is not None]) else math.nan
                for name, column in values.items()
            }

    return run_metric(RowMean, **columns)


def run_metric(kind: type, **columns: Sequence[Any]) -> dict[str, float]:
    """Computes an `evaluate.Metric` of class `kind` on whole columns.

    Data stays in memory. The folder that `evaluate` requires is temporary, so processes on one machine do not share it
    and nothing remains on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="crossflow-metric-") as folder:
        metric = kind(keep_in_memory=True, cache_dir=folder, experiment_id=uuid.uuid4().hex, seed=0)
        return metric.compute(**columns)
