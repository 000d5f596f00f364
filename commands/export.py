"""``crossflow export``: a run in the form of another library."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say
from crossflow.core.errors import UserError


@click.command("export", short_help="Write a run for another library (diffusers, onnx, torch).")
@click.argument("run")
@click.argument("folder", type=options.PATH)
@click.option(
    "--to", "library", type=options.Choice(["diffusers", "onnx", "torch"]), default="diffusers", show_default=True
)
@click.option("--weights", type=options.Choice(["ema", "model"]), help="Default: the averaged ones (ema).")
@click.option("--size", metavar="HxW", help="Height and width of pictures that graphs read. Default: as in training.")
@click.option(
    "--set",
    "replaced",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a setting of the run, such as sample.steps=8; repeatable.",
)
def command(
    run: str, folder: Path, library: str, weights: str | None, size: str | None, replaced: Sequence[str]
) -> None:
    """Write RUN (a run directory, or a hub id) to FOLDER in the form of another library.

    \b
      crossflow export runs/t2i_tiny exported --to diffusers
      crossflow export runs/t2i_tiny graphs --to onnx
      crossflow export runs/depth_tiny graphs --to torch --size 96x128

    The folder of diffusers holds the run itself and a pipeline that samples it, on a machine with this package:

    \b
      pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
      pipe("a red cube").images[0]

    Its pictures are those of `crossflow.load`. Runs sampled by Euler steps, and flow maps, get a scheduler of
    diffusers.

    The folder of onnx (extra onnx) or torch (torch.export) holds source encoder, velocity and decoder as graphs with
    an open batch size, compared with the run to 1e-4, and a README with a program of a few lines that samples by them,
    without this package.
    """
    if library == "diffusers":
        from crossflow.engine.for_diffusers import export

        if size is not None:
            raise UserError("--size belongs to --to onnx and --to torch; a diffusers pipeline takes any size.")
        say(f"Exporting {run} for {library} to {folder}.")
        export(run, folder, weights=weights, overrides=replaced)
        say(f'Use it: DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)')
        return
    from crossflow.engine.graphs import export_graphs

    say(f"Exporting {run} for {library} to {folder}.")
    differences = export_graphs(run, folder, library, weights=weights, overrides=replaced, size=_size(size))
    say("Largest difference from the run: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    say(f"Use it: {folder / 'README.md'} has a program that samples.")


def _size(text: str | None) -> tuple[int, int] | None:
    """96x128 -> (96, 128)."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UserError(f"--size must be height x width in pixels, such as 96x128, got {text!r}.")
    return int(height), int(width)
