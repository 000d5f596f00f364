"""The quality page: every evaluation beside the papers' tables, what makes its numbers incomparable, and its cost.

A run appears in the tables of its protocol, or of its data set; a run evaluated on other data (such as the embedded
scenes) appears beside the main table of its task, with all differences spelled out.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crossflow.benchmarks.report import page
from crossflow.benchmarks.report.matching import (
    differences,
    flow_size,
    is_ablation,
    places,
    score_of,
    size_in_words,
)
from crossflow.benchmarks.report.measured import Measured, find, flow_losses
from crossflow.benchmarks.report.page import Block, Bullets, Cell, Grid, Heading, Link, Picture, Text
from crossflow.benchmarks.report.paper import Paper, Table, paper
from crossflow.benchmarks.score_table import score_rows
from crossflow.core.errors import UserError
from crossflow.core.progress import duration
from crossflow.tasks import task_class, task_names

STRIP_HEIGHT = 380
UNKNOWN = "unknown"


def quality(places: Sequence[Path], folder: Path) -> tuple[Path, Path, list[str]]:
    """Writes quality.md and quality.html to `folder` from every evaluation in `places`.

    Returns both files and one message for each evaluation that could not be read. Raises UserError if there is none.
    """
    rows, problems = find(places)
    if not rows:
        raise UserError(
            f"No evaluation in {', '.join(map(str, places))}. Make one with `crossflow evaluate --checkpoint RUN` and "
            f"give the run, or the folder of the evaluation.{''.join(f' {problem}.' for problem in problems)}"
        )
    blocks = [*_overview(rows, folder), *_tables(rows, paper(), folder), *_training(rows), *_strips(rows)]
    if problems:
        blocks += [Heading("Unreadable evaluations"), Bullets(problems)]
    markdown, html = page.write(folder, "quality", "Quality", blocks)
    return markdown, html, problems


# -- cost and quality of every run


def _overview(rows: Sequence[Measured], folder: Path) -> list[Block]:
    header = ["task", "run", "evaluated on", "score", "trivial baseline", "parameters (flow + encoders)"]
    header += ["training", "evaluations per item", "seconds per item"]
    ordered = sorted(rows, key=lambda row: (row.task, row.name))
    grid: list[list[Cell]] = [
        [row.task, _linked(row, folder), _evaluated_on(row), *_headline(row), *_costs(row)] for row in ordered
    ]
    sentences = [
        "Training: time spent in training steps, on the machine of the run. Evaluations: forward passes of the network "
        "per item; a guided step takes two. Seconds per item: time of the evaluation, scoring included. "
        f"“{UNKNOWN}”: not recorded in the folder. Scores of different tasks cannot be compared."
    ]
    missing = sorted(set(task_names()) - {row.task for row in rows})
    if missing:
        sentences.append(f"Tasks without an evaluation in these folders: {', '.join(missing)}.")
    timed = [(f"{row.task}: {row.name}", row.cost.seconds_per_item) for row in ordered]
    known = [(name, seconds, True) for name, seconds in timed if seconds is not None]
    plot = [Picture("seconds_per_item", page.bars("seconds per item", known), "seconds per item of each run")]
    return [
        Heading("Cost and quality by task"),
        *map(Text, sentences),
        Grid(header, grid),
        *(plot if known else []),
    ]


def _linked(row: Measured, folder: Path) -> Link:
    return Link(row.name, Path(os.path.relpath(row.path.resolve(), folder.resolve())).as_posix())


def _evaluated_on(row: Measured) -> str:
    items = f"{row.num_items} items" if row.num_items is not None else "unknown number of items"
    protocol = f"{row.protocol}: " if row.protocol else ""
    return f"{protocol}{row.data or 'unknown data'} ({row.split or 'unknown split'}), {items}"


def _headline(row: Measured) -> tuple[str, str]:
    """The task's first two scores, and those of the trivial baseline or the shuffled control."""
    table = {line.name: line for line in score_rows(row.scores, row.intervals, row.baseline)}
    names = [name for name in task_class(row.task).Scoring.headline if name in table][:2] or list(table)[:2]
    known = [table[name] for name in names if table[name].baseline is not None]
    scores = ", ".join(f"{name} {_number(row.scores[name])}" for name in names)
    baseline = ", ".join(f"{line.name} {_number(line.baseline)}" for line in known)
    controls = any(line.is_controlled for line in known)
    return scores, f"{baseline}{'; shuffled inputs' if controls else ''}" if known else "none"


def _costs(row: Measured) -> list[str]:
    cost = row.cost
    counts = dict(cost.parameters or {})
    flow, rest = counts.pop("flow", 0), sum(counts.values())
    return [
        UNKNOWN if cost.parameters is None else f"{flow / 1e6:.2f}M + {rest / 1e6:.2f}M",
        UNKNOWN if cost.train_seconds is None else duration(cost.train_seconds),
        UNKNOWN if cost.evaluations is None else str(cost.evaluations),
        UNKNOWN if cost.seconds_per_item is None else _number(cost.seconds_per_item),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# -- the papers' tables


def _tables(rows: Sequence[Measured], numbers: Paper, folder: Path) -> list[Block]:
    blocks: list[Block] = []
    empty = []
    for name, table in numbers.tables.items():
        if is_ablation(name):
            continue
        measured = [row for row in rows if name in places(row, numbers)]
        if measured or table.main:
            blocks += _table(name, measured, numbers, folder)
        else:
            empty.append(f"{table.title} ({table.where}); protocol {table.protocol}")
    if empty:
        blocks += [Heading("Tables without a run"), Bullets(empty)]
    return blocks


def _table(name: str, measured: Sequence[Measured], numbers: Paper, folder: Path) -> list[Block]:
    table = numbers.tables[name]
    protocol = numbers.protocols[table.protocol]
    metrics = [(metric, numbers.metrics[metric]) for metric in table.metrics]
    arrows = [f"{metric} {'↑' if about.better == 'higher' else '↓'}" for metric, about in metrics]
    grid: list[Sequence[Cell]] = [
        [row.name, "paper", size_in_words(row.params), *(_number(score) for score in row.scores)] for row in table.rows
    ]
    first = len(grid)
    for row in measured:
        scores = [_number(score_of(row, about)) for _, about in metrics]
        grid.append([_linked(row, folder), "crossflow", size_in_words(flow_size(row)), *scores])
    source = f"{numbers.cited(table)}. Protocol {table.protocol}: {protocol.data}; {protocol.implementation}."
    blocks: list[Block] = [
        Heading(table.title),
        Text(f"{source} {table.note}".strip()),
        Grid(["", "", "flow parameters", *arrows], grid, frozenset(range(first, len(grid)))),
    ]
    if not measured:
        return [*blocks, Text("No run has been evaluated on this yet.")]
    return [*blocks, *_plot(name, measured, numbers), *_comparability(table, measured, numbers)]


def _plot(name: str, measured: Sequence[Measured], numbers: Paper) -> list[Block]:
    """Bars of the first metric that a measured run has."""
    table = numbers.tables[name]
    for place, metric in enumerate(table.metrics):
        about = numbers.metrics[metric]
        scores = [(row.name, score, True) for row in measured if (score := score_of(row, about)) is not None]
        if scores:
            published = [(row.name, value, False) for row in table.rows if (value := row.scores[place]) is not None]
            title = f"{metric}, {about.better} is better (grey: papers; green: crossflow, under other conditions)"
            png = page.bars(title, [*published, *scores])
            return [Picture(name, png, f"{metric} of the papers' rows and of crossflow's runs")]
    return []


def _comparability(table: Table, measured: Sequence[Measured], numbers: Paper) -> list[Block]:
    """What makes each row incomparable with the papers'; rows with the same differences share one bullet."""
    names: dict[tuple[str, ...], list[str]] = {}
    for row in measured:
        names.setdefault(tuple(differences(row, table, numbers)), []).append(row.name)
    items = []
    for words, same in names.items():
        verdict = f"not comparable with the paper's rows. {'; '.join(words)}." if words else "comparable as measured."
        items.append(f"{', '.join(same)}: {verdict}")
    return [Bullets(items)]


# -- pictures


def _training(rows: Sequence[Measured]) -> list[Block]:
    """The flow loss of every run whose folder exists."""
    runs = {row.run.resolve(): row.task for row in rows if row.run is not None}
    losses = [(run, task, flow_losses(run)) for run, task in runs.items()]
    plots = [
        Picture(f"training_{number}", page.curves(f"{task}: {run.name}", curves), f"flow loss of {run.name}")
        for number, (run, task, curves) in enumerate(losses)
        if curves
    ]
    return [Heading("Training"), Text("Flow loss by optimizer step, logarithmic."), *plots] if plots else []


def _strips(rows: Sequence[Measured]) -> list[Block]:
    blocks: list[Block] = [Heading("Samples"), Text("The first items of each evaluation, not selected.")]
    for number, row in enumerate(rows):
        if row.pictures is not None:
            alt = f"samples of {row.name}"
            blocks += [Text(f"{row.task}, {row.name}"), Picture(f"strip_{number}", strip(row.pictures), alt)]
    without = [row.name for row in rows if row.pictures is None]
    return [*blocks, Text(f"Evaluations without pictures: {', '.join(without)}.")] if without else blocks


def strip(path: Path, height: int = STRIP_HEIGHT) -> bytes:
    """The top `height` pixels of a sheet of samples as PNG, extended to the next blank row so that no text is cut."""
    with Image.open(path) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    blank = np.flatnonzero((sheet[height:] == sheet[height:, :1]).all(axis=(1, 2)))
    return page.png(sheet[: height + int(blank[0])] if len(blank) else sheet)
