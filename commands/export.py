"""``crossflow export``: a run in the form of another library."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say
from crossflow.core.errors import UserError


@click.command("export", short_help="Write a run for another library, or merged with its base.")
@click.argument("run")
@click.argument("folder", type=options.PATH)
@click.option(
    "--to",
    "library",
    type=options.Choice(["diffusers", "onnx", "torch", "run"]),
    default="diffusers",
    show_default=True,
)
@click.option("--weights", type=options.Choice(["ema", "model"]), help="Default: the averaged ones (ema).")
@click.option("--size", metavar="HxW", help="Height and width of pictures that graphs read. Default: as in training.")
@click.option("--adapter-scale", type=float, help="Strength of a fine-tuned run's adapter, with --to run. Default: 1.")
@click.option(
    "--set",
    "replaced",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a setting of the run, such as sample.steps=8; repeatable.",
)
def command(
    run: str, folder: Path, library: str, weights: str | None, size: str | None, adapter_scale: float | None,
    replaced: Sequence[str],
) -> None:  # fmt: skip
    """Write RUN (a run directory, or a hub id) to FOLDER in the form of another library, or as a run of its own.

    \b
      crossflow export runs/t2i_tiny exported --to diffusers
      crossflow export runs/t2i_tiny graphs --to onnx
      crossflow export runs/depth_tiny graphs --to torch --size 96x128
      crossflow export runs/t2i_tiny_finetuned merged --to run --adapter-scale 0.8

    The folder of diffusers holds the run itself and a pipeline that samples it, on a machine with this package:

    \b
      pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
      pipe("a red cube").images[0]

    Its pictures are those of `crossflow.load`. Runs sampled by Euler steps, and flow maps, get a scheduler of
    diffusers.

    The folder of onnx (extra onnx) or torch (torch.export) holds source encoder, velocity and decoder as graphs with
    an open batch size, compared with the run to 1e-4, and a README with a program of a few lines that samples by them,
    without this package. With --to run an adapter is merged into the weights of its base, which is needed no more.
    """
    if library == "run":
        _merge(run, folder, weights, adapter_scale, replaced)
        return
    if adapter_scale is not None:
        raise UserError("--adapter-scale belongs to --to run. Export the run that it writes.")
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


def _merge(run: str, folder: Path, weights: str | None, scale: float | None, replaced: Sequence[str]) -> None:
    from crossflow.core.output import check_output
    from crossflow.engine.sample import load

    check_output(folder, overwrite=False)
    say(f"Merging {run} with its base into {folder}.")
    pipe = load(run, weights=weights, device="cpu", adapter_scale=scale, overrides=replaced)
    if not pipe.adapters:
        raise UserError(f"{run} has no adapter that could be merged: it stores all of its weights.")
    pipe.save(folder)
    say(f"Use it: crossflow sample --checkpoint {folder}")
