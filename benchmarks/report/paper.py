"""The papers' numbers (paper.yaml), typed: tables of rows, the protocol each was measured by, and its metrics."""

import functools
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from crossflow.core.config import Section
from crossflow.core.errors import unknown_name
from crossflow.core.settings import build, read_yaml

FILE = Path(__file__).parents[1] / "paper.yaml"


class Source(Section):
    title: str
    arxiv: str | None = None
    version: str | None = None


class Metric(Section):
    better: Literal["higher", "lower"]
    ours: tuple[str, ...] = ()
    """What the metric is called in a metrics.json, the first that is there counts; empty: not measured here."""
    factor: float = 1.0
    """The paper prints ours times this."""


class Protocol(Section):
    """How a table was measured; None is what its paper does not say."""

    task: str
    data: str
    words: tuple[str, ...] = ()
    """One of them in the name of a data set, or of its place, says that it is this data."""
    split: str | None = None
    resolution: int | None = None
    """Side of the pictures that are scored, in pixels."""
    items: int | None = None
    implementation: str
    """Of the metrics, in words."""


class Row(Section):
    name: str
    params: float | None = None
    """Of the flow network, in millions."""
    scores: tuple[float | None, ...]
    kind: Literal["method", "baseline", "other"] = "other"
    """method: the paper's own; baseline: what it is measured against."""


class Table(Section):
    title: str
    source: str
    where: str
    """Number of the table in its source."""
    protocol: str
    metrics: tuple[str, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    main: bool = False
    """Runs of the task that were measured on other data than any table are shown beside this one."""
    note: str = ""

    def row(self, name: str) -> Row:
        """Raises UserError for a name that no row has."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise unknown_name(f"row of {self.title!r}", name, found)
        return found[name]

    def scores(self, name: str) -> dict[str, float]:
        """The numbers that a row has, by metric."""
        given = zip(self.metrics, self.row(name).scores, strict=True)
        return {metric: score for metric, score in given if score is not None}


class Paper(Section):
    sources: dict[str, Source]
    metrics: dict[str, Metric]
    protocols: dict[str, Protocol]
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _agrees(self) -> "Paper":
        """Every name that is used is there, and every row has a number, or null, for each metric."""
        for name, table in self.tables.items():
            for kind, used, known in (
                ("source", [table.source], self.sources),
                ("protocol", [table.protocol], self.protocols),
                ("metric", list(table.metrics), self.metrics),
            ):
                if missing := [one for one in used if one not in known]:
                    raise ValueError(f"table {name} names the unknown {kind} {', '.join(missing)}")
            for row in table.rows:
                if len(row.scores) != len(table.metrics):
                    raise ValueError(f"table {name}, row {row.name}: {len(row.scores)} numbers for {table.metrics}")
            if len({row.name for row in table.rows}) != len(table.rows):
                raise ValueError(f"table {name} has a row twice")
        return self

    def table(self, name: str) -> Table:
        """Raises UserError for an unknown name."""
        if name not in self.tables:
            raise unknown_name("table", name, self.tables)
        return self.tables[name]

    def cited(self, table: Table) -> str:
        """`Table 3 of Flowing from Words to Pixels (CrossFlow), CVPR 2025, arXiv 2412.15213v2`."""
        source = self.sources[table.source]
        arxiv = f", arXiv {source.arxiv}{source.version or ''}" if source.arxiv else ""
        return f"{table.where}: {source.title}{arxiv}"


@functools.cache
def paper() -> Paper:
    """The numbers that are shipped."""
    return build(Paper, read_yaml(FILE))
