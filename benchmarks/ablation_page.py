"""What an ablation has found so far: for every variant the mean over seeds with its 95 % interval, the difference to
the variant it is compared with (paired by seed), the paper's numbers beside it, and what has not been run and why.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks import page
from crossflow.benchmarks.ablations import Plan, failures_in
from crossflow.benchmarks.measured import Measured, find, train_seconds
from crossflow.benchmarks.page import Block, Bullets, Cell, Grid, Heading, Link, Picture, Text
from crossflow.benchmarks.paper import Table, paper
from crossflow.benchmarks.protocol import load_protocol
from crossflow.benchmarks.quality import strip
from crossflow.core.training.tracking import duration
from crossflow.tasks.base import task_class
from crossflow.tasks.run import environment, write_atomically

# Student's t for 95 %, two-sided, by degrees of freedom; beyond, the normal value is near enough.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; `half` is half the width of its 95 % interval (Student), None for a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        mean, degrees = statistics.fmean(values), len(values) - 1
        if not degrees:
            return cls(mean, None)
        factor = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96
        return cls(mean, factor * statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"


@dataclass(frozen=True)
class Result:
    """A variant as far as it has been run."""

    name: str
    runs: Mapping[int, Measured]
    """By seed."""
    scores: Mapping[str, Estimate]
    train_seconds: Estimate | None
    """Of all its trainings: a first stage and a weak model count."""
    parameters: Mapping[str, int] | None
    missing: Mapping[int, str]
    """Why a seed is not there."""


def results(plan: Plan) -> list[Result]:
    failed = failures_in(plan.folder)
    return [_result(plan, name, failed) for name in plan.group.variants]


def _result(plan: Plan, name: str, failed: Mapping[str, str]) -> Result:
    runs: dict[int, Measured] = {}
    missing: dict[int, str] = {}
    seconds = []
    for seed in plan.budget.seeds:
        jobs = [job for job in plan.jobs if job.seed == seed and name in job.variants]
        if jobs and all(job.done for job in jobs):
            found, problems = find([plan.evaluation(name, seed)])
            if not found:
                missing[seed] = f"failed: {problems[0]}"
                continue
            runs[seed] = found[0]
            times = [train_seconds(job.mark.parent) for job in jobs if job.kind == "train"]
            seconds.append(sum(time for time in times if time is not None))
        else:
            why = next((failed[job.name] for job in jobs if job.name in failed), None)
            optional = plan.group.variants[name].optional
            missing[seed] = "not run" if why is None else f"{'skipped' if optional else 'failed'}: {why}"
    measured = list(runs.values())
    names = [key for key in (measured[0].scores if measured else ()) if all(key in run.scores for run in measured)]
    return Result(
        name=name,
        runs=runs,
        scores={key: Estimate.of([run.scores[key] for run in measured]) for key in names},
        train_seconds=Estimate.of(seconds) if seconds else None,
        parameters=measured[0].cost.parameters if measured else None,
        missing=missing,
    )


@dataclass(frozen=True)
class Difference:
    """A variant less the one it is compared with, in one score, over the seeds that both have."""

    variant: str
    against: str
    score: str
    difference: Estimate
    verdict: str
    """better | worse | not told apart | one seed."""


def difference(ours: Result, other: Result, score: str) -> Difference | None:
    """None unless both have a seed in common with that score."""
    seeds = sorted(ours.runs.keys() & other.runs.keys())
    pairs = [(ours.runs[seed].scores.get(score), other.runs[seed].scores.get(score)) for seed in seeds]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    if not found:
        return None
    estimate = Estimate.of(found)
    if estimate.half is None:
        verdict = "one seed"
    elif abs(estimate.mean) <= estimate.half:
        verdict = "not told apart"
    else:
        verdict = "better" if (estimate.mean > 0) == (better(score) == "higher") else "worse"
    return Difference(ours.name, other.name, score, estimate, verdict)


def better(score: str) -> str:
    """Which way a score of ours is better."""
    for metric in paper().metrics.values():
        if score in metric.ours:
            return metric.better
    low = ("rmse", "abs_rel", "sq_rel", "silog", "log10", "fid", "kid", "flow")
    return "lower" if score.lower().startswith(low) else "higher"


def write(plan: Plan) -> tuple[Path, Path]:
    """Writes ablation.md, ablation.html and results.json to the plan's folder; returns the two pages."""
    found = results(plan)
    headline = _headline(plan, found)
    apart = differences(plan, found, headline)
    write_atomically(plan.folder / "results.json", json.dumps(_record(plan, found, apart), indent=1))
    blocks: list[Block] = [Text(plan.group.about), *_how(plan), _grid(plan, found, headline)]
    blocks += [*_words(plan, found, apart), *_theirs(plan), *_plot(found, headline), *_samples(found)]
    return page.write(plan.folder, "ablation", f"{plan.group.title} ({plan.budget.task})", blocks)


def _headline(plan: Plan, found: Sequence[Result]) -> list[str]:
    """The first scores of the protocol, or else of the task, as far as any run has them."""
    have, protocol = {name for result in found for name in result.scores}, plan.budget.protocol
    usual = load_protocol(protocol).headline if protocol is not None else task_class(plan.budget.task).headline
    return [name for name in usual if name in have or not have] or sorted(have)[:4]


def differences(plan: Plan, found: Sequence[Result], headline: Sequence[str]) -> list[Difference]:
    """Each variant and the one it is compared with, in the first headline score."""
    by_name = {result.name: result for result in found}
    pairs = [
        (name, variant.against or plan.group.reference)
        for name, variant in plan.group.variants.items()
        if name != (variant.against or plan.group.reference)
    ]
    made = [difference(by_name[a], by_name[b], headline[0]) for a, b in pairs] if headline else []
    return [one for one in made if one is not None]


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


def _table(plan: Plan) -> Table | None:
    return paper().table(plan.group.table) if plan.group.table is not None else None


def _numbers_differ(plan: Plan) -> str:
    table = _table(plan)
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
    table = _table(plan)
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


def orders(plan: Plan, found: Sequence[Result]) -> list[str]:
    """For neighbours in the paper's order by its first metric: whether ours have it, in words."""
    table = _table(plan)
    if table is None:
        return []
    metric = table.metrics[0]
    headline = _headline(plan, found)
    ranked = [
        (result, score)
        for result in found
        if (row := plan.group.variants[result.name].paper) is not None
        and (score := table.scores(row).get(metric)) is not None
    ]
    ranked.sort(key=lambda pair: pair[1], reverse=paper().metrics[metric].better == "lower")  # the worst first
    said = []
    for (worse, low), (good, high) in itertools.pairwise(ranked):
        claim = f"{good.name} is better than {worse.name} in the paper ({metric} {high:g} and {low:g})"
        found_here = difference(good, worse, headline[0]) if headline else None
        if found_here is None:
            said.append(f"{claim}; not run here.")
        else:
            verdict = {
                "better": "reproduced",
                "worse": "not reproduced: the other way round",
                "not told apart": "not reproduced: the two cannot be told apart here",
                "one seed": "one seed alone, which decides nothing",
            }[found_here.verdict]
            said.append(f"{claim}; {verdict} ({headline[0]} {found_here.difference.mean:+.3g}).")
    return said


def _theirs(plan: Plan) -> list[Block]:
    """Rows of the paper that no variant stands for."""
    table = _table(plan)
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
