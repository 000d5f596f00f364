"""``crossflow export``: a run in the form of another library."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say


@click.command("export", short_help="Write a run for another library (diffusers).")
@click.argument("run")
@click.argument("folder", type=options.PATH)
@click.option("--to", "library", type=options.Choice(["diffusers"]), default="diffusers", show_default=True)
@click.option("--weights", type=options.Choice(["ema", "model"]), help="Default: the averaged ones (ema).")
@click.option(
    "--set",
    "replaced",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a setting of the run, such as sample.steps=8; repeatable.",
)
def command(run: str, folder: Path, library: str, weights: str | None, replaced: Sequence[str]) -> None:
    """Write RUN (a run directory, or a hub id) to FOLDER in the form of another library.

    \b
      crossflow export runs/t2i_tiny exported --to diffusers

    The folder of diffusers holds the run itself and a pipeline that samples it, on a machine with this package:

    \b
      pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
      pipe("a red cube").images[0]

    Its pictures are those of `crossflow.load`. Runs sampled by Euler steps, and flow maps, get a scheduler of
    diffusers.
    """
    from crossflow.engine.for_diffusers import export

    say(f"Exporting {run} for {library} to {folder}.")
    export(run, folder, weights=weights, overrides=replaced)
    say(f'Use it: DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)')
