"""``crossflow plot``: the curves of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from crossflow.commands import options
from crossflow.commands.console import open_file, say
from crossflow.core.output import check_output


@click.command("plot", short_help="Draw the curves of runs.")
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="RUN...")
@click.option(
    "--x",
    type=options.Choice(["steps", "minutes", "cpu minutes"]),
    default="steps",
    show_default=True,
    help="What runs are drawn over; cpu minutes: processor time of all threads.",
)
@click.option("--curve", "names", multiple=True, metavar="NAME", help="flow, val/flow, lr, ...; repeatable.")
@click.option("--output", type=options.PATH, help="The picture. Default: RUN/curves.png of the first run, replaced.")
@click.option("--overwrite", is_flag=True, help="Replace the file named by --output.")
@options.open_result
def command(
    runs: Sequence[Path],
    x: Literal["steps", "minutes", "cpu minutes"],
    names: Sequence[str],
    output: Path | None,
    overwrite: bool,
    open_result: bool,
) -> None:
    """Draw losses, gradient norm, validation and scores of runs over each other, here and as a PNG.

    \b
      crossflow plot runs/t2i_tiny
      crossflow plot runs/first runs/second --x minutes --curve val/flow

    A run that is still being trained can be drawn too. Values that span more than a factor of ten are drawn
    logarithmically.
    """
    from crossflow.engine.curves import read_panels, save_chart, text_chart

    check_output(output, overwrite=overwrite)
    panels = read_panels(runs, x, names)
    for panel in panels:
        if any(len(points) > 1 for points in panel.lines.values()):
            for row in text_chart(panel):
                say(row)
            say()
        else:
            values = ", ".join(f"{label} {points[-1][1]:.4g}" for label, points in panel.lines.items())
            say(f"{panel.name}: {values}")
    picture = save_chart(panels, output or runs[0] / "curves.png", x=x)
    say(f"Wrote {picture}.")
    if open_result:
        open_file(picture)
