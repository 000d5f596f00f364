"""``crossflow ablate``."""

import shlex
from pathlib import Path
from typing import Any

import click

from crossflow.commands.console import say
from crossflow.commands.options import TaskName
from crossflow.core.errors import UserError


@click.command("ablate")
@click.argument("group", required=False)
@click.option("--list", "listed", is_flag=True, help="The groups, their variants and the tables they belong to.")
@click.option("--task", default="t2i", show_default=True, type=TaskName())
@click.option("--recipe", help="What the runs start from. Default: TASK_tiny.")
@click.option("--data", help="Training data. Default: the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of each run. Default: the recipe's.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Instead: as many steps for all as the slowest variant makes in so many minutes here.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, ... of each variant.")
@click.option("--only", multiple=True, help="A variant to run; may be given several times. Default: all.")
@click.option("--protocol", help="By which runs are evaluated (crossflow list protocols). Default: the task's rules.")
@click.option("--eval-data", help="What they are evaluated on. Default: the recipe's data, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Items of each evaluation. Default: 240, or all of the protocol.")
@click.option("--split", type=click.Choice(["val", "test", "all"]), help="Default: test, or the protocol's.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of runs and results. Default: ablations/GROUP.")
@click.option("--dry-run", is_flag=True, help="List the commands, and which of them are done; nothing is run.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE | VARIANT:KEY=VALUE]...")
def command(
    group: str | None,
    listed: bool,
    task: str,
    recipe: str | None,
    minutes: float | None,
    seeds: int,
    num: int | None,
    split: str | None,
    protocol: str | None,
    output: Path | None,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train and compare the variants of a GROUP: encoder, loss, guidance, text, training, path, size or solver.

    \b
      crossflow ablate --list
      crossflow ablate encoder --minutes 3 --seeds 3
      crossflow ablate encoder --task depth --steps 500 --output ablations/depth
      crossflow ablate guidance --dry-run
      crossflow ablate text t5:text.encoder=~/t5-v1_1-xxl
      crossflow ablate size --recipe t2i_256_dimr_70m --data cache:cached --only crossflow-tiny --only baseline-tiny

    Each group is one file in configs/ablations; GROUP may also be a file of yours. Every run is a process of its own:
    one that fails is told and does not end the others. Ctrl-C, or a kill, loses at most what a run did since its last
    checkpoint: give the command again, and it goes on. The page (ablation.html, ablation.md, results.json) is written
    anew after every run, with the paper's numbers beside ours and what has not been run.
    """
    from crossflow.benchmarks.ablation import page as ablation_page
    from crossflow.benchmarks.ablation import plan as ablation_plan
    from crossflow.benchmarks.ablation import run as ablations

    if listed or group is None:
        _list_ablations()
        return
    if given["steps"] is not None and minutes is not None:
        raise UserError("Give --steps or --minutes, not both.")
    named = ablation_plan.load_group(group)
    folder = output or Path("ablations") / (named.name if task == "t2i" else f"{named.name}-{task}")
    given["overrides"] = tuple(given["overrides"])
    if protocol is None:
        num, split = num or 240, split or "test"
    budget = ablation_plan.Budget(
        task=task,
        recipe=recipe or f"{task}_tiny",
        seeds=tuple(range(seeds)),
        num_items=num,
        split=split,
        protocol=protocol,
        **given,
    )
    plan = ablations.planned(named, budget, folder, minutes, say, measure=not dry_run)
    if dry_run:
        for job in plan.jobs:
            say(f"{'done' if job.done else 'to do'}  crossflow {shlex.join(job.command)}")
        say(f"{len(plan.jobs)} commands, {sum(job.done for job in plan.jobs)} done; nothing was run.")
        return
    ablations.run(plan, say, after_each=lambda: ablation_page.write(plan))
    markdown, html = ablation_page.write(plan)
    left = [job.name for job in plan.jobs if not job.done]
    say(f"Wrote {html} and {markdown}." + (f" Not done: {', '.join(left)}." if left else ""))


def _list_ablations() -> None:
    from crossflow.benchmarks.ablation.plan import groups, load_group
    from crossflow.benchmarks.report.paper import paper

    for name in groups():
        group = load_group(name)
        where = paper().table(group.table).where.partition(";")[0] if group.table is not None else "in no paper"
        say(f"{name}: {group.title} ({where}); tasks {', '.join(group.tasks)}")
        say(f"    {group.about}")
        say(f"    variants: {', '.join(group.variants)}")
    say("Run one: crossflow ablate GROUP --minutes 3 --seeds 3 (--dry-run lists the commands; --help says more).")
