"""``crossflow benchmark quality|speed``: results beside the papers' tables; times on this machine."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import progress_bar, say, warn
from crossflow.core.output import check_output, output_folder
from crossflow.tasks import task_names


@click.group("benchmark")
def command() -> None:
    """Measure and compare: quality beside the papers' numbers, speed on this machine."""


@command.command()
@click.option(
    "--runs",
    "places",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Run directory, folder of runs or evaluations, or JSON file; repeatable.",
)
@options.output_folder("quality")
@options.overwrite
@click.argument("more", nargs=-1, type=options.PATH, metavar="[DIR]...")
def quality(places: Sequence[Path], output: Path | None, overwrite: bool, more: Sequence[Path]) -> None:
    """One page: measured scores beside the papers' tables, what makes rows incomparable, and what each task costs.

    \b
      crossflow benchmark quality --runs runs
      crossflow benchmark quality --runs runs/sr_tiny runs/depth_tiny --output page

    Reads the results of `crossflow evaluate`; a run that was never evaluated is shown with the scores of the end of its
    training. Writes quality.md with its pictures beside it, and quality.html as a single file.
    """
    from crossflow.benchmarks.report.quality import quality as write_page

    check_output(output, overwrite=overwrite)
    with output_folder(Path("quality"), output, overwrite=overwrite) as folder:
        markdown, html, problems = write_page([*places, *more], folder)
    for problem in problems:
        warn(f"not read: {problem}")
    say(f"Wrote {html} and {markdown}.")


@command.command()
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help="Recipe whose training steps or sampling are timed; repeatable. Default: every tiny one; for sampling, the "
    "papers'.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["scenes", "training", "cache", "sampling"]),
    help="What is measured; repeatable. Default: everything but sampling.",
)
@click.option("--output", type=options.PATH, help="JSON file to write. Default: none.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def speed(recipes: Sequence[str], parts: Sequence[str], output: Path | None, overwrite: bool) -> None:
    """Scenes rendered, seconds per training step, samples read and pictures sampled per second, on this machine.

    The part `cache` reads a feature cache and, side by side, files as the released CrossFlow scripts write them (one
    pickle per sample): `clip` holds what a 256 px CLIP model needs, `all` everything those scripts put into a file;
    `cold` means read from the disk.

    The part `sampling` times text encoder, source encoder, flow and decoder of the papers' models with random weights,
    with and without torch.compile: a batch of 64 in bfloat16 on a GPU; on a CPU one picture of two steps.
    """
    import tempfile

    from crossflow.benchmarks.speed import run
    from crossflow.core.files import write_atomically

    check_output(output, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder, progress_bar("measuring") as on_step:
        results = run.measure(
            recipes or [f"{task}_tiny" for task in task_names()],
            Path(folder),
            parts=parts or run.DEFAULT_PARTS,
            sampled=recipes or run.RECIPES,
            progress=on_step,
        )
    for row in [row for part in run.PARTS for row in results.get(part, [])]:
        say("  ".join(f"{name} {value}" for name, value in row.items()))
    if output is not None:
        write_atomically(output, json.dumps(results, indent=1))
        say(f"Wrote {output}.")
