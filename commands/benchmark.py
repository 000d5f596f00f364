"""``crossflow benchmark quality|speed``."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands.console import progress_bar, say, warn
from crossflow.tasks import task_names


@click.group("benchmark")
def command() -> None:
    """Measure and compare: quality beside the papers' numbers, speed on this machine."""


@command.command()
@click.option(
    "--runs",
    "given",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Run directory, folder of runs or evaluations, or JSON file; may be given several times.",
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("quality"), show_default=True)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
def quality(given: Sequence[Path], output: Path, more: Sequence[Path]) -> None:
    """One page: what was measured beside the papers' tables, what makes rows incomparable, and what each task costs.

    \b
      crossflow benchmark quality --runs runs
      crossflow benchmark quality --runs runs/sr_tiny runs/depth_tiny --output page

    It reads what `crossflow evaluate` has written; a run that was never evaluated is shown with the scores of the end
    of its training. Writes quality.md, with its pictures beside it, and quality.html, which holds everything.
    """
    from crossflow.benchmarks.report.quality import quality as compare

    markdown, html, problems = compare([*given, *more], output)
    for problem in problems:
        warn(f"not read: {problem}")
    say(f"Wrote {html} and {markdown}.")


@command.command()
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help="Recipes whose training steps or sampling are timed. Default: every tiny one, for sampling the papers'.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["scenes", "training", "cache", "sampling"]),
    help="What is measured; may be given several times. Default: everything but sampling.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def speed(recipes: Sequence[str], parts: Sequence[str], output: Path | None) -> None:
    """Scenes rendered, seconds per training step, samples read and pictures made per second, on this machine.

    The part `cache` reads a feature cache and, side by side, files as the released CrossFlow scripts write them (one
    pickle per sample): `clip` holds what a 256 px CLIP model needs, `all` everything those scripts put into a file;
    `cold` means read from the disk.

    The part `sampling` times text encoder, source encoder, flow and decoder of the papers' models with random weights,
    with and without torch.compile: a batch of 64 in bfloat16 on a GPU; on a CPU one picture of two steps.
    """
    import tempfile

    from crossflow.benchmarks.speed import measures
    from crossflow.core.files import write_atomically

    with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder, progress_bar("measuring") as on_step:
        found = measures.speed(
            recipes or [f"{task}_tiny" for task in task_names()],
            Path(folder),
            parts=parts or measures.USUAL,
            sampled=recipes or measures.generation.RECIPES,
            progress=on_step,
        )
    for row in [row for part in measures.PARTS for row in found.get(part, [])]:
        say("  ".join(f"{name} {value}" for name, value in row.items()))
    if output is not None:
        write_atomically(output, json.dumps(found, indent=1))
        say(f"Wrote {output}.")
