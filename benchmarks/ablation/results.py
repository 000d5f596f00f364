"""The results of an ablation so far: the mean of every variant over its seeds with a 95 % interval, its difference from
the variant that it is compared with (paired by seed), and whether the paper's order is reproduced.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from crossflow.benchmarks.ablation.plan import Plan
from crossflow.benchmarks.ablation.run import failures_in
from crossflow.benchmarks.estimate import Estimate
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.benchmarks.report.measured import Measured, find, train_seconds
from crossflow.benchmarks.report.paper import Table, paper
from crossflow.tasks import task_class

LOWER_IS_BETTER = ("rmse", "abs_rel", "sq_rel", "silog", "log10", "fid", "kid", "flow", "lpips")
"""Prefixes of the names of scores that paper.yaml does not list."""
Verdict = Literal["better", "worse", "not distinguishable", "one seed"]
REPRODUCED: dict[Verdict, str] = {
    "better": "reproduced",
    "worse": "not reproduced: the order is reversed",
    "not distinguishable": "not reproduced: the two are not distinguishable here",
    "one seed": "inconclusive with one seed",
}
"""What a verdict on (better row of the paper) - (worse row) says about the paper's order."""


@dataclass(frozen=True)
class Result:
    """The results of a variant so far."""

    name: str
    runs: Mapping[int, Measured] = field(default_factory=dict)
    """Evaluations by seed."""
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    train_seconds: Estimate | None = None
    """Of all trainings of a seed, including a first stage and a weak model."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """Why a seed has no result."""

    @property
    def parameters(self) -> Mapping[str, int] | None:
        """Number of parameters by part, None without a run."""
        return next((run.cost.parameters for run in self.runs.values()), None)


def results(plan: Plan) -> list[Result]:
    """The results of all variants, in the group's order."""
    failed = failures_in(plan.folder)
    return [_result(plan, name, failed) for name in plan.group.variants]


def _result(plan: Plan, name: str, failed: Mapping[str, str]) -> Result:
    runs: dict[int, Measured] = {}
    missing: dict[int, str] = {}
    seconds = []
    for seed in plan.budget.seeds:
        jobs = [job for job in plan.jobs if job.seed == seed and name in job.variants]
        if not jobs or not all(job.done for job in jobs):
            why = next((failed[job.name] for job in jobs if job.name in failed), None)
            optional = plan.group.variants[name].optional
            missing[seed] = "not run" if why is None else f"{'skipped' if optional else 'failed'}: {why}"
            continue
        evaluations, problems = find([plan.evaluation(name, seed)])
        if not evaluations:
            missing[seed] = f"failed: {problems[0]}"
            continue
        runs[seed] = evaluations[0]
        times = [train_seconds(job.mark.parent) for job in jobs if job.kind == "train"]
        seconds.append(sum(time for time in times if time is not None))
    measured = list(runs.values())
    shared = [key for key in (measured[0].scores if measured else ()) if all(key in run.scores for run in measured)]
    return Result(
        name=name,
        runs=runs,
        scores={key: Estimate.of([run.scores[key] for run in measured]) for key in shared},
        train_seconds=Estimate.of(seconds) if seconds else None,
        missing=missing,
    )


def better(score: str) -> Literal["higher", "lower"]:
    """The direction in which a score is better."""
    for metric in paper().metrics.values():
        if score in metric.names:
            return metric.better
    return "lower" if score.lower().startswith(LOWER_IS_BETTER) else "higher"


def headline_of(plan: Plan, measured: Sequence[Result]) -> list[str]:
    """The headline scores of the protocol, or else of the task, that any run has."""
    available, protocol = {name for result in measured for name in result.scores}, plan.budget.protocol
    names = load_protocol(protocol).headline if protocol is not None else task_class(plan.budget.task).Scoring.headline
    return [name for name in names if name in available or not available] or sorted(available)[:4]


# -- differences between variants


@dataclass(frozen=True)
class Difference:
    """A variant minus the one that it is compared with, in one score, over the seeds of both."""

    variant: str
    against: str
    score: str
    difference: Estimate
    verdict: Verdict


def difference(result: Result, other: Result, score: str) -> Difference | None:
    """The paired difference in a score; None without a common seed that has it."""
    seeds = sorted(result.runs.keys() & other.runs.keys())
    pairs = [(result.runs[seed].scores.get(score), other.runs[seed].scores.get(score)) for seed in seeds]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values:
        return None
    estimate = Estimate.of(values)
    verdict: Verdict
    if estimate.half is None:
        verdict = "one seed"
    elif not estimate.excludes_zero:
        verdict = "not distinguishable"
    else:
        verdict = "better" if (estimate.mean > 0) == (better(score) == "higher") else "worse"
    return Difference(result.name, other.name, score, estimate, verdict)


def differences(plan: Plan, measured: Sequence[Result], headline: Sequence[str]) -> list[Difference]:
    """Each variant against the one that it is compared with, in the first headline score."""
    if not headline:
        return []
    by_name = {result.name: result for result in measured}
    pairs = [difference(by_name[a], by_name[b], headline[0]) for a, b in plan.group.comparisons()]
    return [pair for pair in pairs if pair is not None]


def orders(plan: Plan, measured: Sequence[Result]) -> list[str]:
    """For each pair of neighbours in the paper's ranking by its first metric: is it reproduced?"""
    table = table_of(plan)
    if table is None:
        return []
    metric = table.metrics[0]
    headline = headline_of(plan, measured)
    ranking = [
        (result, score)
        for result in measured
        if (row := plan.group.variants[result.name].paper) is not None
        and (score := table.scores(row).get(metric)) is not None
    ]
    ranking.sort(key=lambda pair: pair[1], reverse=paper().metrics[metric].better == "lower")  # the worst first
    sentences = []
    for (worse, low), (good, high) in itertools.pairwise(ranking):
        claim = f"{good.name} is better than {worse.name} in the paper ({metric} {high:g} and {low:g})"
        here = difference(good, worse, headline[0]) if headline else None
        if here is None:
            sentences.append(f"{claim}; not run here.")
        else:
            sentences.append(f"{claim}; {REPRODUCED[here.verdict]} ({headline[0]} {here.difference.mean:+.3g}).")
    return sentences


def table_of(plan: Plan) -> Table | None:
    """The paper's table of the group."""
    return paper().table(plan.group.table) if plan.group.table is not None else None
