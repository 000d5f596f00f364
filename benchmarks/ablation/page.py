"""The page of an ablation: our numbers beside the paper's, with intervals, differences, and what has not been run."""

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
from crossflow.core.training.tracking import duration
from crossflow.engine.provenance import environment


def write(plan: Plan) -> tuple[Path, Path]:
    """Writes ablation.md, ablation.html and results.json to the plan's folder; returns the two pages."""
    found = results(plan)
    headline = headline_of(plan, found)
    apart = differences(plan, found, headline)
    write_atomically(plan.folder / "results.json", json.dumps(_record(plan, found, apart), indent=1))
    blocks: list[Block] = [Text(plan.group.about), *_how(plan), _grid(plan, found, headline)]
    blocks += [*_words(plan, found, apart), *_theirs(plan), *_plot(found, headline), *_samples(found)]
    return page.write(plan.folder, "ablation", f"{plan.group.title} ({plan.budget.task})", blocks)


def _how(plan: Plan) -> list[Block]:
    budget = plan.budget
    data = budget.data or "the recipe's data"
    seeds = ", ".join(map(str, budget.seeds))
    changed = f" Settings of all runs: {' '.join(budget.overrides)}." if budget.overrides else ""
    return [
        Text(
            f"Ours: recipe {budget.recipe} on {data}, {plan.steps} steps a run, seeds {seeds}; scored {_scored(plan)}, "
            f"the same items and noise for all.{changed} "
            "± is half of the 95 % interval of the mean over seeds (Student), which says nothing of other data or "
            "sizes."
        ),
        Text(_numbers_differ(plan)),
    ]


def _scored(plan: Plan) -> str:
    budget = plan.budget
    number = f"on at most {budget.num_items} items" if budget.num_items is not None else "on all items"
    rules = f" by the protocol {budget.protocol}" if budget.protocol else f" of the {budget.split} split"
    return f"{number}{rules}{f' ({budget.eval_data})' if budget.eval_data else ''}"


def _numbers_differ(plan: Plan) -> str:
    table = table_of(plan)
    if table is None:
        return "The papers have no such table."
    protocol = paper().protocols[table.protocol]
    sizes = sorted({row.params for row in table.rows if row.params})
    size = f", models of {' to '.join(f'{one:g}M' for one in dict.fromkeys((sizes[0], sizes[-1])))}" if sizes else ""
    return (
        f"The paper's columns ({paper().cited(table)}) are {', '.join(table.metrics)} on {protocol.data}{size}: other "
        "data, metrics and sizes than ours. Only the order of rows can be compared, not the numbers."
    )


def _grid(plan: Plan, found: Sequence[Result], headline: Sequence[str]) -> Grid:
    table = table_of(plan)
    header = ["variant", *(f"paper: {metric}" for metric in (table.metrics if table else ()))]
    header += [f"{name} {'↑' if better(name) == 'higher' else '↓'}" for name in headline]
    header += ["parameters", "training", "evaluations", "seeds"]
    return Grid(header, [_row(plan, result, table, headline) for result in found])


def _row(plan: Plan, result: Result, table: Table | None, headline: Sequence[str]) -> list[Cell]:
    variant = plan.group.variants[result.name]
    theirs = table.scores(variant.paper) if table is not None and variant.paper is not None else {}
    first: Cell = result.name + (f" ({variant.about})" if variant.about else "")
    shown = [f"{theirs[metric]:g}" if metric in theirs else "-" for metric in (table.metrics if table else ())]
    if not result.runs:
        said = next(iter(result.missing.values()), "not run")
        return [first, *shown, *(said.partition(":")[0] for _ in headline), "-", "-", "-", "0"]
    run = next(iter(result.runs.values()))
    counts = result.parameters
    return [
        Link(str(first), run.path.relative_to(plan.folder).as_posix()),
        *shown,
        *(str(result.scores[name]) if name in result.scores else "-" for name in headline),
        f"{sum(counts.values()) / 1e6:.2f}M" if counts else "-",
        duration(result.train_seconds.mean) if result.train_seconds else "-",
        str(run.cost.evaluations) if run.cost.evaluations is not None else "adaptive",
        str(len(result.runs)),
    ]


def _words(plan: Plan, found: Sequence[Result], apart: Sequence[Difference]) -> list[Block]:
    said = [
        f"{one.variant} against {one.against}: {one.score} {one.difference.mean:+.3g}"
        f"{f' ± {one.difference.half:.2g}' if one.difference.half is not None else ''}, {one.verdict}"
        f"{' (no interval from one seed)' if one.verdict == 'one seed' else ''}."
        for one in apart
    ]
    blocks: list[Block] = [Heading("Differences, paired by seed"), Bullets(said)] if said else []
    order = orders(plan, found)
    if order:
        blocks += [Heading("The paper's order"), Bullets(order)]
    missing = [
        f"{result.name}, seed {seed}: {why}"
        for result in found
        for seed, why in result.missing.items()
        if result.missing
    ]
    return [*blocks, Heading("Not run"), Bullets(missing)] if missing else blocks


def _theirs(plan: Plan) -> list[Block]:
    """Rows of the paper that no variant stands for."""
    table = table_of(plan)
    if table is None:
        return []
    used = {variant.paper for variant in plan.group.variants.values()}
    rows = [[row.name, *(f"{s:g}" if s is not None else "-" for s in row.scores)] for row in table.rows]
    rows = [row for row in rows if row[0] not in used]
    note = [Text(table.note)] if table.note else []
    return [*note, Heading("Other rows of the paper"), Grid(["", *table.metrics], rows)] if rows else [*note]


def _plot(found: Sequence[Result], headline: Sequence[str]) -> list[Block]:
    shown = [(result.name, result.scores[headline[0]]) for result in found if headline and headline[0] in result.scores]
    if not shown:
        return []
    title = f"{headline[0]}, {better(headline[0])} is better; bars: 95 % interval over seeds"
    png = page.bars(title, [(name, s.mean, True) for name, s in shown], [s.half or 0.0 for _, s in shown])
    return [Picture("scores", png, f"{headline[0]} of each variant")]


def _samples(found: Sequence[Result]) -> list[Block]:
    blocks: list[Block] = []
    for result in found:
        run = next(iter(result.runs.values()), None)
        if run is not None and run.pictures is not None:
            blocks += [Text(result.name), Picture(f"strip_{result.name}", strip(run.pictures, 200), result.name)]
    first = "The same items for each variant, of its first seed, not picked."
    return [Heading("Samples"), Text(first), *blocks] if blocks else []


def _record(plan: Plan, found: Sequence[Result], apart: Sequence[Difference]) -> dict[str, Any]:
    """Everything on the page, to be read by programs."""
    budget = asdict(plan.budget) | {"steps": plan.steps}
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
        for result in found
    }
    compared = [asdict(one) for one in apart]
    return {
        "group": plan.group.name,
        "budget": budget,
        "variants": variants,
        "differences": compared,
        "order": orders(plan, found),
        "commands": {job.name: " ".join(("crossflow", *job.command)) for job in plan.jobs},
        **environment(),
    }
