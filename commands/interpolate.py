"""``crossflow interpolate``: a walk between two source latents."""

from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import progress_bar
from crossflow.commands.inputs import typed_inputs
from crossflow.commands.outputs import numbered_results, write_animation, write_results
from crossflow.core.output import output_folder


@click.command("interpolate", short_help="Walk from one source to another in the latent space.")
@uses_model("outputs/interpolate")
@click.option("--from", "start", required=True, help="Prompt, or path of a picture.")
@click.option("--to", "end", required=True, help="Prompt, or path of a picture.")
@click.option("--frames", default=9, show_default=True, type=click.IntRange(2), help="Number of frames with both ends.")
@click.option(
    "--kind",
    default="lerp",
    show_default=True,
    type=options.Choice(["lerp", "slerp"]),
    help="Straight line or great circle.",
)
@options.latent_noise
@options.latent_means
@click.option("--fps", default=8.0, show_default=True, type=click.FloatRange(0.1, 60), help="Frames per second.")
def command(model: Model, start: str, end: str, frames: int, kind: str, noise: str, mean: bool, fps: float) -> None:
    """Walk from one source to another in the latent space.

    A picture of another size than the first is cropped and resized to it. Writes the task's output for every frame
    and, for pictures, a grid, an animated GIF and (with the extra `video`) an MP4.

    \b
      crossflow interpolate --checkpoint runs/t2i_tiny --from "a red cube" --to "a blue sphere" --frames 16
      crossflow interpolate --checkpoint runs/depth_tiny --from one.jpg --to other.jpg --kind slerp
    """
    from crossflow.engine import latents

    pipe = model.pipe
    model.announce(model.planned(Path("outputs/interpolate")))
    first, last = typed_inputs(pipe, start, end)
    with progress_bar("interpolating") as on_step:
        results = latents.interpolate(
            pipe,
            first,
            last,
            frames,
            kind=kind,
            seed=model.seed,
            shared_noise=noise == "shared",
            output_type="np",
            on_step=on_step,
            **model.settings | ({"mode": True} if mean else {}),
        )
    names = [f"{index / (frames - 1):.2f}" for index in range(frames)]
    details = {"from": start, "to": end, "kind": kind, "noise": noise, "mean": mean}
    with output_folder(Path("outputs/interpolate"), model.output, overwrite=model.overwrite) as folder:
        write_results(model, numbered_results(results, names, **details), folder)
        write_animation(pipe.task.pictures(results), folder, fps)
