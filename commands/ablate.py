"""``crossflow ablate``: train and compare the variants of a group."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crossflow.commands import options
from crossflow.commands.console import open_file, say
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.benchmarks.ablation.plan import Budget


@click.command("ablate", short_help="Train and compare the variants of a question of the papers.")
@click.argument("group", required=False)
@click.option("--list", "listed", is_flag=True, help="List the groups, their variants and the tables they belong to.")
@click.option("--task", type=options.TaskName(), help="Default: the first task of the group.")
@click.option("--recipe", help="Recipe that every run starts from. Default: TASK_tiny.")
@click.option("--data", help="Training data. Default: the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of each run. Default: the recipe's.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Instead of --steps: the number of steps that the slowest variant makes in this time on this machine.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, ... of each variant.")
@click.option("--only", multiple=True, help="Variant to run; repeatable. Default: all.")
@click.option("--protocol", help="Protocol of the evaluations (crossflow list protocols). Default: the task's rules.")
@click.option("--eval-data", help="Data of the evaluations. Default: the recipe's, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Items of each evaluation. Default: 240, or all of the protocol.")
@click.option("--split", type=options.Choice(["val", "test", "all"]), help="Default: test, or the protocol's.")
@click.option("--output", type=options.PATH, help="Folder of runs and results. Default: ablations/GROUP.")
@options.open_result
@click.option("--dry-run", is_flag=True, help="List the commands and which of them are done; nothing is run.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE | VARIANT:KEY=VALUE]...")
def command(
    group: str | None,
    listed: bool,
    minutes: float | None,
    output: Path | None,
    dry_run: bool,
    open_result: bool,
    **settings: Any,
) -> None:
    """Train and compare the variants of a GROUP: encoder, source, loss, guidance, text, training, path, size or solver.

    \b
      crossflow ablate --list
      crossflow ablate encoder --minutes 3 --seeds 3
      crossflow ablate encoder --task depth --steps 500 --output ablations/depth
      crossflow ablate guidance --dry-run
      crossflow ablate text t5:text.encoder=~/t5-v1_1-xxl
      crossflow ablate size --recipe t2i_256_dimr_70m --data cache:cached --only crossflow-tiny --only baseline-tiny

    Each group is one file in configs/ablations; GROUP may also be your own file. Every run is a process of its own:
    failures are reported, and the remaining runs continue. After Ctrl-C or a kill, the same command continues from the
    last checkpoint. The page (ablation.html, ablation.md, results.json) is rewritten after every run, with the paper's
    numbers beside the measured ones and a list of the runs that are missing.
    """
    if listed or group is None:
        _list_groups()
        return
    if settings["steps"] is not None and minutes is not None:
        raise UserError("--steps and --minutes exclude each other; give one of them.")
    from crossflow.benchmarks.ablation import page, run
    from crossflow.benchmarks.ablation.group import load_group

    loaded = load_group(group)
    budget = _budget(settings | {"task": settings["task"] or loaded.default_task})
    suffix = "" if budget.task == loaded.default_task else f"-{budget.task}"
    folder = output or Path("ablations") / f"{loaded.name}{suffix}"
    plan = run.plan_with_minutes(loaded, budget, folder, minutes, say, measure=not dry_run)
    if dry_run:
        for job in plan.jobs:
            say(f"{'done' if job.done else 'to do'}  crossflow {shlex.join(job.command)}")
        say(f"{len(plan.jobs)} commands, {sum(job.done for job in plan.jobs)} done; nothing was run.")
        return
    say(f"Using the group {loaded.name} ({budget.task}, recipe {budget.recipe}). Results go to {folder}.")
    run.run(plan, say, after_each=lambda: page.write(plan))
    markdown, html = page.write(plan)
    unfinished = [job.name for job in plan.jobs if not job.done]
    say(f"Wrote {html} and {markdown}." + (f" Not done: {', '.join(unfinished)}." if unfinished else ""))
    if open_result:
        open_file(html)


def _budget(settings: dict[str, Any]) -> "Budget":
    """What every run of the ablation shares, from the options of the command."""
    from crossflow.benchmarks.ablation.plan import Budget

    protocol, task = settings["protocol"], settings["task"]
    return Budget(
        task=task,
        recipe=settings["recipe"] or f"{task}_tiny",
        data=settings["data"],
        steps=settings["steps"],
        seeds=tuple(range(settings["seeds"])),
        only=settings["only"],
        protocol=protocol,
        eval_data=settings["eval_data"],
        num_items=settings["num"] or (240 if protocol is None else None),
        split=settings["split"] or ("test" if protocol is None else None),
        overrides=tuple(settings["overrides"]),
    )


def _list_groups() -> None:
    from crossflow.benchmarks.ablation.group import groups, load_group
    from crossflow.benchmarks.report.paper import paper

    for name in groups():
        group = load_group(name)
        where = paper().table(group.table).where.partition(";")[0] if group.table is not None else "in no paper"
        say(f"{name}: {group.title} ({where}); {'tasks ' + ', '.join(group.tasks) if group.tasks else 'every task'}")
        say(f"    {group.about}")
        say(f"    variants: {', '.join(group.variants)}")
    say("Run one: crossflow ablate GROUP --minutes 3 --seeds 3 (--dry-run lists the commands; see --help).")
