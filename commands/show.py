"""``crossflow show``: what a run is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.console import open_file, print_json, print_table, say
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.engine.describe import Description

MAX_SAMPLES = 3
"""Pictures of the training whose paths are printed: the last ones."""


@click.command("show", short_help="Say what a run is: settings, scores, files, origin.")
@click.argument("run")
@options.as_json
@options.open_result
def command(run: str, as_json: bool, open_result: bool) -> None:
    """Say what RUN (a run directory, or a hub id) is: settings that differ from its recipe, scores, files,
    provenance; of a joint run those of each task.

    \b
      crossflow show runs/t2i_tiny
      crossflow show runs/t2i_tiny --json
      crossflow show runs/t2i_tiny --open                    its last picture
    """
    from crossflow.engine.describe import describe
    from crossflow.engine.joint.pipeline import joint_tasks, task_folders
    from crossflow.networks.hub import run_folder

    folder = run_folder(run)
    descriptions = [describe(place) for place in task_folders(folder)]
    if open_result and not descriptions[0].samples:
        raise UserError(f"{run} has no pictures of its training to open: its folder `samples` is empty or missing.")
    if as_json:
        contents = [description.as_json() for description in descriptions]
        print_json({"folder": str(folder), "tasks": contents} if joint_tasks(folder) else contents[0])
    else:
        for description in descriptions:
            _show(description)
    if open_result:
        open_file(descriptions[0].samples[-1])


def _show(run: "Description") -> None:
    say(f"{run.folder}: {run.config.task}")
    print_table(_facts(run).items())
    if run.differences:
        say(f"{len(run.differences)} settings differ from the recipe {run.recipe}:")
        print_table([(name, str(own), f"recipe: {recipe}") for name, (recipe, own) in run.differences.items()])
    for each in run.measurements:
        items = "" if each.num_items is None else f", {each.num_items} items"
        say(f"{each.title} on {each.data} ({each.split}{items}): {each.path}")
        print_table([(name, f"{value:.4g}", _interval(each.intervals, name)) for name, value in each.leading().items()])


def _interval(intervals: "Mapping[str, object]", name: str) -> str:
    bounds = intervals.get(name)
    return f"{bounds[0]:.4g} to {bounds[1]:.4g}" if isinstance(bounds, list | tuple) else ""


def _facts(run: "Description") -> dict[str, str]:
    parts = ", ".join(f"{part} {number / 1e6:.2f}M" for part, number in run.num_parameters.items())
    manifest = run.manifest
    data, versions = manifest.get("data", {}), manifest.get("versions", {})
    facts = {
        "recipe": f"{run.recipe}{'' if run.differences else ', unchanged'}" if run.recipe else "",
        "trained": f"{run.step or 0} of {run.config.train.steps} steps of {run.config.train.batch_size}",
        "parameters": parts,
        "base": f"{base}; the parameters are what differs" if (base := run.config.finetune.base) is not None else "",
        "data": f"{run.config.data.train}" + (f", {data['num_items']} items" if "num_items" in data else ""),
        "weights": "none yet" if run.weights is None else str(run.weights),
        "curves": "" if run.curves is None else str(run.curves),
        "samples": ", ".join(map(str, run.samples[-MAX_SAMPLES:])),
        "command": " ".join(map(str, manifest.get("command", ()))),
        "started": str(manifest.get("started", "")),
        "machine": ", ".join(str(manifest[name]) for name in ("machine", "gpu") if manifest.get(name)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "git": str(manifest.get("git") or ""),
    }
    return {name: value for name, value in facts.items() if value}
