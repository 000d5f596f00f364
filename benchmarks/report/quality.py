"""One page of quality: what was measured here beside the papers' numbers, what makes rows incomparable, and what each
task costs.

A run is shown in the tables whose protocol it was measured by, or on whose data; one measured on other data (the
embedded scenes) is shown beside the main table of its task, with everything that differs said in words.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crossflow.benchmarks.report import page
from crossflow.benchmarks.report.measured import Measured, find, flow_losses
from crossflow.benchmarks.report.page import Block, Bullets, Cell, Grid, Heading, Link, Picture, Text
from crossflow.benchmarks.report.paper import Metric, Paper, Protocol, Table, paper
from crossflow.core.errors import UserError
from crossflow.tasks.base import task_class

APART = ("ablation-", "flowtok-")
"""Tables of ablations, which `crossflow ablate` shows."""
STRIP_HEIGHT = 380


def quality(places: Sequence[Path], folder: Path) -> tuple[Path, Path, list[str]]:
    """Writes quality.md and quality.html to `folder` from every evaluation in `places`; returns both, and what could
    not be read. Raises UserError when there is none.
    """
    rows, problems = find(list(places))
    if not rows:
        raise UserError(
            f"No evaluation in {', '.join(map(str, places))}. Make one with `crossflow evaluate --checkpoint RUN`, and "
            f"give the run or the folder it wrote to.{''.join(f' {problem}.' for problem in problems)}"
        )
    numbers = paper()
    blocks = [*_overview(rows, folder), *_tables(rows, numbers, folder), *_training(rows), *_strips(rows)]
    if problems:
        blocks += [Heading("Not read"), Bullets(problems)]
    markdown, html = page.write(folder, "quality", "Quality", blocks)
    return markdown, html, problems


# -- four tasks


def _overview(rows: Sequence[Measured], folder: Path) -> list[Block]:
    """Cost and quality of every run, by task."""
    header = ["task", "run", "measured on", "score", "trivial baseline", "parameters (flow + encoders)"]
    header += ["training", "evaluations per item", "seconds per item"]
    ordered = sorted(rows, key=lambda row: (row.task, row.name))
    grid: list[list[Cell]] = [
        [row.task, _linked(row, folder), _measured_on(row), *_headline(row), *_costs(row)] for row in ordered
    ]
    said = [
        "Training is the time of the training steps on the machine of the run; seconds per item those of the "
        "evaluation, with the scoring; guidance evaluates the network twice. "
        "“not said”: the folder does not tell. Scores of different tasks are not to be compared with each other."
    ]
    missing = sorted(set(_all_tasks()) - {row.task for row in rows})
    if missing:
        said.append(f"No evaluation of {', '.join(missing)} was among the folders.")
    timed = [(f"{row.task}: {row.name}", row.cost.seconds_per_item) for row in ordered]
    known = [(name, seconds, True) for name, seconds in timed if seconds is not None]
    plot = [Picture("seconds_per_item", page.bars("seconds per item", known), "seconds per item of each run")]
    return [
        Heading("The tasks, their cost and quality"),
        *map(Text, said),
        Grid(header, grid),
        *(plot if known else []),
    ]


def _all_tasks() -> tuple[str, ...]:
    from crossflow.tasks import task_names

    return task_names()


def _linked(row: Measured, folder: Path) -> Link:
    return Link(row.name, Path(os.path.relpath(row.path.resolve(), folder.resolve())).as_posix())


def _measured_on(row: Measured) -> str:
    items = f"{row.num_items} items" if row.num_items is not None else "number of items not said"
    named = f"{row.protocol}: " if row.protocol else ""
    return f"{named}{row.data or 'data not said'} ({row.split or 'split not said'}), {items}"


def _headline(row: Measured) -> tuple[str, str]:
    """The task's first two scores, and those of the trivial baseline (or of shuffled prompts)."""
    names = [name for name in task_class(row.task).headline if name in row.scores][:2] or list(row.scores)[:2]
    base = {name: row.baseline.get(name, row.scores.get(f"shuffled_{name}")) for name in names}
    control = "; shuffled prompts" if any(f"shuffled_{name}" in row.scores for name in names) else ""
    told = ", ".join(f"{name} {_number(value)}" for name, value in base.items() if value is not None)
    return ", ".join(f"{name} {_number(row.scores[name])}" for name in names), f"{told}{control}" if told else "none"


def _costs(row: Measured) -> list[str]:
    cost = row.cost
    counts = dict(cost.parameters or {})
    flow, rest = counts.pop("flow", 0), sum(counts.values())
    return [
        "not said" if cost.parameters is None else f"{_millions(flow)} + {_millions(rest)}",
        "not said" if cost.train_seconds is None else _duration(cost.train_seconds),
        "not said" if cost.evaluations is None else str(cost.evaluations),
        "not said" if cost.seconds_per_item is None else _number(cost.seconds_per_item),
    ]


# -- tables


def _tables(rows: Sequence[Measured], numbers: Paper, folder: Path) -> list[Block]:
    blocks: list[Block] = []
    unmeasured = []
    for name, table in numbers.tables.items():
        if name.startswith(APART):
            continue
        ours = [row for row in rows if name in places(row, numbers)]
        if ours or table.main:
            blocks += _table(name, table, ours, numbers, folder)
        else:
            unmeasured.append(f"{table.title} ({table.where}); protocol {table.protocol}")
    if unmeasured:
        blocks += [Heading("Tables without a run of ours"), Bullets(unmeasured)]
    return blocks


def places(row: Measured, numbers: Paper) -> list[str]:
    """Names of the tables that a run belongs beside."""
    own = {
        name: table
        for name, table in numbers.tables.items()
        if numbers.protocols[table.protocol].task == row.task and not name.startswith(APART)
    }
    exact = [name for name, table in own.items() if table.protocol == row.protocol]
    if exact:
        return exact
    on_data = [name for name, table in own.items() if same_data(row, numbers.protocols[table.protocol])]
    first = [name for name in on_data if own[name].protocol == own[on_data[0]].protocol]
    return first or [name for name, table in own.items() if table.main]


def same_data(row: Measured, protocol: Protocol) -> bool:
    """Whether the data that a run was measured on are called like those of the protocol."""
    spec = (row.data or "").lower()
    return any(word in spec for word in protocol.words)


def _table(name: str, table: Table, ours: Sequence[Measured], numbers: Paper, folder: Path) -> list[Block]:
    protocol = numbers.protocols[table.protocol]
    measured = [(metric, numbers.metrics[metric]) for metric in table.metrics]
    arrows = [f"{metric} {'↑' if about.better == 'higher' else '↓'}" for metric, about in measured]
    grid: list[Sequence[Cell]] = [
        [row.name, "paper", _size(row.params), *(_number(score) for score in row.scores)] for row in table.rows
    ]
    first = len(grid)
    for row in ours:
        scores = [_number(score_of(row, about)) for _, about in measured]
        grid.append([_linked(row, folder), "ours", _size(_flow_size(row)), *scores])
    blocks: list[Block] = [
        Heading(table.title),
        Text(
            f"{numbers.cited(table)}. Protocol {table.protocol}: {protocol.data}; {protocol.implementation}. "
            f"{table.note}".strip()
        ),
        Grid(["", "", "flow parameters", *arrows], grid, frozenset(range(first, len(grid)))),
    ]
    if not ours:
        return [*blocks, Text("Not measured here yet.")]
    return [*blocks, *_plot(name, table, ours, numbers), *_differences(table, ours, numbers)]


def score_of(row: Measured, metric: Metric) -> float | None:
    """What the run measured of a paper's metric, in the paper's unit."""
    known = {_plain(name): value for name, value in row.scores.items()}
    found = [known[_plain(name)] for name in metric.ours if _plain(name) in known]
    return metric.factor * found[0] if found else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _plot(name: str, table: Table, ours: Sequence[Measured], numbers: Paper) -> list[Block]:
    """Bars of the first metric that a run of ours has."""
    for at, metric in enumerate(table.metrics):
        about = numbers.metrics[metric]
        found = [(row.name, score) for row in ours if (score := score_of(row, about)) is not None]
        if found:
            theirs = [(row.name, score, False) for row in table.rows if (score := row.scores[at]) is not None]
            title = f"{metric}, {about.better} is better (grey: the papers' rows, green: ours, under other conditions)"
            png = page.bars(title, [*theirs, *((label, score, True) for label, score in found)])
            return [Picture(name, png, f"{metric} of the papers' rows and ours")]
    return []


def _differences(table: Table, ours: Sequence[Measured], numbers: Paper) -> list[Block]:
    """What makes each of our rows incomparable with the papers'; rows for which it is the same are told once."""
    told: dict[tuple[str, ...], list[str]] = {}
    for row in ours:
        told.setdefault(tuple(differences(row, table, numbers)), []).append(row.name)
    items = []
    for words, names in told.items():
        verdict = f"not comparable with the paper's rows. {'; '.join(words)}." if words else "comparable as measured."
        items.append(f"{', '.join(names)}: {verdict}")
    return [Bullets(items)]


def differences(row: Measured, table: Table, numbers: Paper) -> list[str]:
    """In words, how a run was measured otherwise than the table: data, resolution, split, items, metrics, size."""
    protocol = numbers.protocols[table.protocol]
    named = row.protocol == table.protocol
    words = []
    if not named and not same_data(row, protocol):
        words.append(f"data set: {row.data or 'not said'} here, {protocol.data} in the paper")
    elif not named:
        words.append(f"data set: {row.data} is called like {protocol.data}, but no protocol has checked it")
    size = row.manifest.get("image_size")
    if protocol.resolution is not None and size != protocol.resolution:
        words.append(f"resolution: {f'{size} px' if size else 'not said'} here, {protocol.resolution} px in the paper")
    if protocol.split is not None and row.split != protocol.split:
        words.append(f"split: {row.split or 'not said'} here, {protocol.split} in the paper")
    if protocol.items is not None and row.num_items != protocol.items:
        words.append(f"items: {row.num_items if row.num_items is not None else 'not said'} here, {protocol.items}")
    lacking = [metric for metric in table.metrics if score_of(row, numbers.metrics[metric]) is None]
    if lacking:
        words.append(f"not measured here: {', '.join(lacking)}")
    if not named and len(lacking) < len(table.metrics):
        words.append(f"metric implementation: crossflow's own here; in the paper {protocol.implementation}")
    theirs = [each.params for each in table.rows if each.kind == "method" and each.params]
    flow = _flow_size(row)
    if theirs and flow is None:
        words.append(f"size: not said here, {_size(theirs[0])} in the paper")
    elif theirs and flow is not None and not any(0.9 < flow / params < 1.1 for params in theirs):
        words.append(f"size: {_size(flow)} here, {_size(theirs[0])} in the paper")
    return words


def _flow_size(row: Measured) -> float | None:
    """Parameters of the flow network in millions."""
    return row.cost.parameters["flow"] / 1e6 if row.cost.parameters and "flow" in row.cost.parameters else None


# -- pictures


def _strips(rows: Sequence[Measured]) -> list[Block]:
    blocks: list[Block] = [Heading("Samples"), Text("The first items of each evaluation, not picked.")]
    for number, row in enumerate(rows):
        if row.pictures is not None:
            alt = f"samples of {row.name}"
            blocks += [Text(f"{row.task}, {row.name}"), Picture(f"strip_{number}", strip(row.pictures), alt)]
    without = [row.name for row in rows if row.pictures is None]
    return [*blocks, Text(f"No pictures beside the scores of {', '.join(without)}.")] if without else blocks


def _training(rows: Sequence[Measured]) -> list[Block]:
    """The flow loss of every run whose folder is there."""
    runs = {row.run.resolve(): row.task for row in rows if row.run is not None}
    drawn = [(run, task, flow_losses(run)) for run, task in runs.items()]
    plots = [
        Picture(f"training_{number}", page.curves(f"{task}: {run.name}", losses), f"flow loss of {run.name}")
        for number, (run, task, losses) in enumerate(drawn)
        if losses
    ]
    return [Heading("Training"), Text("Flow loss by optimizer step, logarithmic."), *plots] if plots else []


def strip(path: Path, height: int = STRIP_HEIGHT) -> bytes:
    """The top of a sheet of samples as PNG: so many pixels, and on to the next row of one colour, so that no line of
    text is cut through.
    """
    with Image.open(path) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    blank = np.flatnonzero((sheet[height:] == sheet[height:, :1]).all(axis=(1, 2)))
    return page.png(sheet[: height + int(blank[0])] if len(blank) else sheet)


# -- words


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


def _size(millions: float | None) -> str:
    return "-" if millions is None else f"{millions:.3g}M" if millions < 1000 else f"{millions / 1000:.3g}B"


def _duration(seconds: float) -> str:
    from crossflow.core.training.tracking import duration

    return duration(seconds)


__all__ = ["differences", "places", "quality", "same_data", "score_of", "strip"]
