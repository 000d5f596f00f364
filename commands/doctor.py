"""``crossflow doctor``: whether the machine, a planned training, or runs are in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.console import count, print_json, print_table, say
from crossflow.core.errors import UserError
from crossflow.core.output import check_output

if TYPE_CHECKING:
    from crossflow.core.config import Config
    from crossflow.engine.health.finding import Finding


@click.command("doctor", short_help="Say what is wrong with a machine, a plan or a run.")
@click.argument("words", nargs=-1, metavar="[RUN]... | [KEY=VALUE]...")
@click.option("--task", type=options.TaskName(), help="Plan a training of this task.")
@click.option("--config", "recipe", type=options.RecipeName(), help="Plan a training of this recipe or YAML file.")
@click.option("--data", help="Training data of the plan.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Devices that share a batch.")
@click.option("--no-measuring", is_flag=True, help="Read what a run has logged alone; its weights are not loaded.")
@click.option("--save-reference", type=options.PATH, help="Write the band of these runs of a recipe to RECIPE.json.")
@options.as_json
@click.option("--strict", is_flag=True, help="Exit with status 2 when anything is wrong.")
def command(
    words: Sequence[str], task: str | None, recipe: str | None, data: str | None, processes: int,
    no_measuring: bool, save_reference: Path | None, as_json: bool, strict: bool,
) -> None:  # fmt: skip
    """Say what is wrong with this machine, with a training that is planned, or with runs, and what to do about it.

    \b
      crossflow doctor                                      Python, devices, memory, Java, packages, disks
      crossflow doctor --task t2i --data coco:~/flickr8k    data, memory and checkpoints before the first step
      crossflow doctor --config t2i_small train.batch_size=256 --processes 4
      crossflow doctor runs/t2i_tiny                        losses, gradients, posteriors, data, scores of a run

    A run is compared with the shipped band of its recipe, if there is one, and its weights with a few validation items.
    Of a joint run each task is examined.
    """
    if data is not None and task is None and recipe is None:
        raise UserError("--data belongs to a training that is planned: add --task or --config.")
    if save_reference is not None:
        _save_reference(save_reference, [Path(word) for word in words])
        return
    if task is not None or recipe is not None:
        settings = ([f"data.train={data}"] if data is not None else []) + list(words)
        subjects = [_examine_plan(recipe or f"{task}_tiny", settings, task, processes)]
    elif words:
        from crossflow.engine.joint.pipeline import task_folders

        folders = [folder for word in words for folder in task_folders(Path(word))]
        subjects = [_examine_run(folder, measure=not no_measuring) for folder in folders]
    else:
        subjects = [_examine_machine()]
    if as_json:
        print_json([vars(each) | {"findings": [vars(finding) for finding in each.findings]} for each in subjects])
    num_findings = sum(len(each.findings) for each in subjects)
    if strict and num_findings:
        raise UserError(f"{count(num_findings, 'finding')}, and --strict allows none.")


@dataclass(frozen=True)
class Examined:
    """What was examined: the machine, a plan or a run; what is known of it, and what is wrong."""

    subject: str
    facts: Mapping[str, str]
    findings: "Sequence[Finding]"


def _examine_machine() -> Examined:
    from crossflow.engine.health.machine import examine_machine, facts

    return _report("machine", facts(), examine_machine(), "The machine is in order.")


def _examine_plan(source: str, settings: Sequence[str], task: str | None, processes: int) -> Examined:
    from crossflow.tasks import load_config, task_class

    config = load_config(source, settings, task)
    quick = load_config(source, [*settings, *task_class(config.task).quick], task)
    return examine_training(source, config, quick, processes)


def examine_training(source: str, config: "Config", quick: "Config", processes: int = 1) -> Examined:
    """Prints what a training takes, and what stands in its way; quick: with less to be learned before its flow."""
    from crossflow.core.files import size_in_words
    from crossflow.engine.health.machine import devices, free_bytes
    from crossflow.engine.health.plan import examine_plan, plan

    device, free = devices()[0], free_bytes(Path("runs"))
    size = plan(quick, num_processes=processes, report=say)
    facts = {
        "training data": "unavailable" if size.num_train is None else f"{size.num_train} items, {config.data.train}",
        "validation data": "unavailable" if size.num_val is None else f"{size.num_val} items",
        "parameters": ", ".join(f"{name} {number / 1e6:.2f}M" for name, number in size.parameters.items()),
        "trained": f"{size.num_trained / 1e6:.2f}M parameters",
        "memory": ", ".join(f"{name} {size_in_words(number)}" for name, number in size.memory.items()),
        "peak": f"{size_in_words(size.peak)} of {device}",
        "checkpoint": "unknown" if size.checkpoint is None else size_in_words(size.checkpoint),
        "disk": f"{size_in_words(size.disk_bytes)} of {size_in_words(free)} free",
    }
    return _report(source, facts, examine_plan(size, device, free), "Nothing stands in the way of this training.")


def _examine_run(folder: Path, *, measure: bool) -> Examined:
    from crossflow.engine.health.checks import CHECKS, examine
    from crossflow.engine.health.evidence import gather
    from crossflow.engine.health.summary import describe

    evidence = gather(folder, measure=measure)
    say(str(folder))
    return _report(
        str(folder), describe(evidence), examine(evidence), f"Nothing is wrong: {len(CHECKS)} checks passed."
    )


def _report(subject: str, facts: Mapping[str, str], findings: "Sequence[Finding]", praise: str) -> Examined:
    print_table(facts.items())
    for finding in findings:
        say(str(finding))
    if not findings:
        say(praise)
    return Examined(subject, facts, findings)


def _save_reference(path: Path, runs: Sequence[Path]) -> None:
    from crossflow.core.files import write_atomically
    from crossflow.engine.health.evidence import gather
    from crossflow.engine.health.reference import measure_reference

    if not runs:
        raise UserError("--save-reference needs the runs that it is measured from.")
    check_output(path, overwrite=None)
    measured = [gather(run, references=()).measured for run in runs]
    posteriors = [None if each is None else each.posterior for each in measured]
    reference = measure_reference(path.stem, runs, posteriors)
    write_atomically(path, reference.model_dump_json(indent=None) + "\n")
    say(f"Wrote {path}: the band of {count(len(runs), 'run')} of {reference.steps} steps.")
