"""The papers' numbers (paper.yaml), typed: tables, the protocol by which each was measured, and their metrics."""

import functools
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from crossflow.core.config import Section
from crossflow.core.errors import unknown_name
from crossflow.core.settings import build, read_yaml

FILE = Path(__file__).parents[1] / "paper.yaml"


class Source(Section):
    """A publication."""

    title: str
    arxiv: str | None = None
    version: str | None = None


class Metric(Section):
    """A metric as the papers print it."""

    better: Literal["higher", "lower"]
    names: tuple[str, ...] = ()
    """Names of the same score in a metrics.json; the first one present counts. Empty: crossflow does not measure it."""
    factor: float = 1.0
    """The paper prints the score of metrics.json times this factor."""


class Protocol(Section):
    """How a table was measured; None where its paper does not say."""

    task: str
    data: str
    words: tuple[str, ...] = ()
    """A data SPEC that contains one of these words is taken for this data set."""
    split: str | None = None
    resolution: int | None = None
    """Side of the scored pictures in pixels."""
    items: int | None = None
    implementation: str
    """How the metrics were computed, in words."""


class Row(Section):
    """One row of a table."""

    name: str
    params: float | None = None
    """Parameters of the flow network, in millions."""
    scores: tuple[float | None, ...]
    """One number per metric of the table; None where the paper gives none."""
    kind: Literal["method", "baseline", "other"] = "other"
    """method: the paper's own; baseline: what the paper compares itself with."""


class Table(Section):
    """A table of a paper, measured by one protocol."""

    title: str
    source: str
    where: str
    """Number of the table in its source."""
    protocol: str
    metrics: tuple[str, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    main: bool = False
    """Shown beside runs of its task that were evaluated on none of the papers' data sets."""
    note: str = ""

    def row(self, name: str) -> Row:
        """The row called `name`. Raises UserError for an unknown name."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise unknown_name(f"row of {self.title!r}", name, rows)
        return rows[name]

    def scores(self, name: str) -> dict[str, float]:
        """The numbers of a row by metric, without the missing ones."""
        pairs = zip(self.metrics, self.row(name).scores, strict=True)
        return {metric: score for metric, score in pairs if score is not None}


class Paper(Section):
    """Everything in paper.yaml.

    >>> paper().table("zero-shot-nyu").scores("DPT")
    {'AbsRel': 0.098, 'delta1': 0.903}
    """

    sources: dict[str, Source]
    metrics: dict[str, Metric]
    protocols: dict[str, Protocol]
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _agrees(self) -> "Paper":
        """Every referenced name exists, and every row has a number (or null) for each metric."""
        for name, table in self.tables.items():
            for kind, used, known in (
                ("source", [table.source], self.sources),
                ("protocol", [table.protocol], self.protocols),
                ("metric", list(table.metrics), self.metrics),
            ):
                if missing := [each for each in used if each not in known]:
                    raise ValueError(f"table {name} refers to the unknown {kind} {', '.join(missing)}")
            for row in table.rows:
                if len(row.scores) != len(table.metrics):
                    raise ValueError(
                        f"table {name}, row {row.name}: expected {len(table.metrics)} scores, got {len(row.scores)}"
                    )
            if len({row.name for row in table.rows}) != len(table.rows):
                raise ValueError(f"table {name} has two rows of the same name")
        return self

    def table(self, name: str) -> Table:
        """The table called `name`. Raises UserError for an unknown name."""
        if name not in self.tables:
            raise unknown_name("table", name, self.tables)
        return self.tables[name]

    def cited(self, table: Table) -> str:
        """Where a table is printed, such as `Table 3: Flowing from Words to Pixels, arXiv 2412.15213v2`."""
        source = self.sources[table.source]
        arxiv = f", arXiv {source.arxiv}{source.version or ''}" if source.arxiv else ""
        return f"{table.where}: {source.title}{arxiv}"


@functools.cache
def paper() -> Paper:
    """The shipped numbers."""
    return build(Paper, read_yaml(FILE))
