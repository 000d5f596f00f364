"""What an ablation has found so far: for every variant the mean over seeds with its 95 % interval, the difference to
the variant it is compared with (paired by seed), and whether the paper's order is reproduced.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crossflow.benchmarks.ablation.plan import Plan
from crossflow.benchmarks.ablation.run import failures_in
from crossflow.benchmarks.estimate import Estimate
from crossflow.benchmarks.evaluation.protocol import load_protocol
from crossflow.benchmarks.report.measured import Measured, find, train_seconds
from crossflow.benchmarks.report.paper import Table, paper
from crossflow.tasks.base import task_class


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
    elif not estimate.excludes_zero:
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


def headline_of(plan: Plan, found: Sequence[Result]) -> list[str]:
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


def orders(plan: Plan, found: Sequence[Result]) -> list[str]:
    """For neighbours in the paper's order by its first metric: whether ours have it, in words."""
    table = table_of(plan)
    if table is None:
        return []
    metric = table.metrics[0]
    headline = headline_of(plan, found)
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


def table_of(plan: Plan) -> Table | None:
    return paper().table(plan.group.table) if plan.group.table is not None else None
