"""The page of an ablation: measured numbers beside the paper's, with intervals, differences, and what is missing."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crossflow.benchmarks.ablation.plan import Plan
from crossflow.benchmarks.ablation.results import (
    Difference,
    Result,
    better,
    differences,
    headline_of,
    orders,
    results,
    table_of,
)
from crossflow.benchmarks.report import page
from crossflow.benchmarks.report.page import Block, Bullets, Cell, Grid, Heading, Link, Picture, Text
from crossflow.benchmarks.report.paper import Table, paper
from crossflow.benchmarks.report.quality import strip
from crossflow.core.files import write_atomically
from crossflow.core.progress import duration
from crossflow.engine.provenance import environment

STRIP_HEIGHT = 200


def write(plan: Plan) -> tuple[Path, Path]:
    """Writes ablation.md, ablation.html and results.json to the plan's folder; returns the two pages."""
    measured = results(plan)
    headline = headline_of(plan, measured)
    pairs = differences(plan, measured, headline)
    write_atomically(plan.folder / "results.json", json.dumps(_record(plan, measured, pairs), indent=1))
    blocks: list[Block] = [Text(plan.group.about), *_conditions(plan), _grid(plan, measured, headline)]
    blocks += [*_findings(plan, measured, pairs), *_other_rows(plan), *_plot(measured, headline), *_samples(measured)]
    return page.write(plan.folder, "ablation", f"{plan.group.title} ({plan.budget.task})", blocks)


# -- how it was measured


def _conditions(plan: Plan) -> list[Block]:
    budget = plan.budget
    data = budget.data or "the recipe's data"
    seeds = ", ".join(map(str, budget.seeds))
    changed = f" Settings of all runs: {' '.join(budget.overrides)}." if budget.overrides else ""
    return [
        Text(
            f"Runs: recipe {budget.recipe} on {data}, {plan.steps} steps each, seeds {seeds}; evaluated "
            f"{_evaluated(plan)}, all on the same items with the same noise.{changed} ± is half of the 95 % interval "
            "of the mean over seeds (Student's t); it does not cover other data or sizes."
        ),
        Text(_comparability(plan)),
    ]


def _evaluated(plan: Plan) -> str:
    budget = plan.budget
    number = f"on at most {budget.num_items} items" if budget.num_items is not None else "on all items"
    rules = f" by the protocol {budget.protocol}" if budget.protocol else f" of the {budget.split} split"
    return f"{number}{rules}{f' ({budget.eval_data})' if budget.eval_data else ''}"


def _comparability(plan: Plan) -> str:
    table = table_of(plan)
    if table is None:
        return "The papers have no such table."
    protocol = paper().protocols[table.protocol]
    sizes = sorted({row.params for row in table.rows if row.params})
    limits = " to ".join(f"{size:g}M" for size in dict.fromkeys(sizes[:1] + sizes[-1:]))
    models = f", models of {limits}" if sizes else ""
    return (
        f"The paper's columns ({paper().cited(table)}) are {', '.join(table.metrics)} on {protocol.data}{models}. "
        "Data, metrics and sizes differ from those here: only the order of the rows can be compared, not the numbers."
    )


# -- the table


def _grid(plan: Plan, measured: Sequence[Result], headline: Sequence[str]) -> Grid:
    table = table_of(plan)
    header = ["variant", *(f"paper: {metric}" for metric in (table.metrics if table else ()))]
    header += [f"{name} {'↑' if better(name) == 'higher' else '↓'}" for name in headline]
    header += ["parameters", "training", "evaluations", "seeds"]
    return Grid(header, [_row(plan, result, table, headline) for result in measured])


def _row(plan: Plan, result: Result, table: Table | None, headline: Sequence[str]) -> list[Cell]:
    variant = plan.group.variants[result.name]
    name = result.name + (f" ({variant.about})" if variant.about else "")
    published = table.scores(variant.paper) if table is not None and variant.paper is not None else {}
    columns = [f"{published[metric]:g}" if metric in published else "-" for metric in (table.metrics if table else ())]
    if not result.runs:
        why = next(iter(result.missing.values()), "not run").partition(":")[0]
        return [name, *columns, *(why for _ in headline), "-", "-", "-", "0"]
    run = next(iter(result.runs.values()))
    counts = result.parameters
    return [
        Link(name, run.path.relative_to(plan.folder).as_posix()),
        *columns,
        *(str(result.scores[score]) if score in result.scores else "-" for score in headline),
        f"{sum(counts.values()) / 1e6:.2f}M" if counts else "-",
        duration(result.train_seconds.mean) if result.train_seconds else "-",
        str(run.cost.evaluations) if run.cost.evaluations is not None else "adaptive",
        str(len(result.runs)),
    ]


def _other_rows(plan: Plan) -> list[Block]:
    """Rows of the paper to which no variant corresponds."""
    table = table_of(plan)
    if table is None:
        return []
    used = {variant.paper for variant in plan.group.variants.values()}
    rows = [
        [row.name, *(f"{score:g}" if score is not None else "-" for score in row.scores)]
        for row in table.rows
        if row.name not in used
    ]
    note: list[Block] = [Text(table.note)] if table.note else []
    return [*note, Heading("Other rows of the paper"), Grid(["", *table.metrics], rows)] if rows else note


# -- findings


def _findings(plan: Plan, measured: Sequence[Result], pairs: Sequence[Difference]) -> list[Block]:
    blocks: list[Block] = []
    if pairs:
        blocks += [Heading("Differences, paired by seed"), Bullets([_sentence(pair) for pair in pairs])]
    order = orders(plan, measured)
    if order:
        blocks += [Heading("The paper's order"), Bullets(order)]
    missing = [f"{result.name}, seed {seed}: {why}" for result in measured for seed, why in result.missing.items()]
    return [*blocks, Heading("Not run"), Bullets(missing)] if missing else blocks


def _sentence(pair: Difference) -> str:
    half = f" ± {pair.difference.half:.2g}" if pair.difference.half is not None else ""
    verdict = "no interval from one seed" if pair.verdict == "one seed" else pair.verdict
    return f"{pair.variant} against {pair.against}: {pair.score} {pair.difference.mean:+.3g}{half}, {verdict}."


def _plot(measured: Sequence[Result], headline: Sequence[str]) -> list[Block]:
    if not headline:
        return []
    score = headline[0]
    estimates = [(result.name, result.scores[score]) for result in measured if score in result.scores]
    if not estimates:
        return []
    title = f"{score}, {better(score)} is better; error bars: 95 % interval over seeds"
    values = [(name, estimate.mean, True) for name, estimate in estimates]
    png = page.bars(title, values, [estimate.half or 0.0 for _, estimate in estimates])
    return [Picture("scores", png, f"{score} of each variant")]


def _samples(measured: Sequence[Result]) -> list[Block]:
    blocks: list[Block] = []
    for result in measured:
        run = next(iter(result.runs.values()), None)
        if run is not None and run.pictures is not None:
            picture = Picture(f"strip_{result.name}", strip(run.pictures, STRIP_HEIGHT), result.name)
            blocks += [Text(result.name), picture]
    caption = "The same items for each variant, from its first seed, not selected."
    return [Heading("Samples"), Text(caption), *blocks] if blocks else []


# -- results.json


def _record(plan: Plan, measured: Sequence[Result], pairs: Sequence[Difference]) -> dict[str, Any]:
    """Everything on the page, for programs."""
    variants = {
        result.name: {
            "settings": plan.settings(result.name),
            "sample": plan.sample(result.name),
            "scores": {name: asdict(estimate) for name, estimate in result.scores.items()},
            "by_seed": {seed: dict(run.scores) for seed, run in result.runs.items()},
            "train_seconds": asdict(result.train_seconds) if result.train_seconds else None,
            "parameters": dict(result.parameters) if result.parameters else None,
            "missing": dict(result.missing),
        }
        for result in measured
    }
    return {
        "group": plan.group.name,
        "budget": asdict(plan.budget) | {"steps": plan.steps},
        "variants": variants,
        "differences": [asdict(pair) for pair in pairs],
        "order": orders(plan, measured),
        "commands": {job.name: " ".join(("crossflow", *job.command)) for job in plan.jobs},
        **environment(),
    }
