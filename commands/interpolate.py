"""``crossflow interpolate``."""

from pathlib import Path
from typing import Any

import click

from crossflow.commands.checkpoint import Use, uses_checkpoint
from crossflow.commands.console import progress_bar
from crossflow.commands.inputs import read_typed
from crossflow.commands.outputs import animate, mixes_latents, write_all


@click.command("interpolate")
@uses_checkpoint()
@click.option("--from", "start", required=True, help="A prompt, or the path of a picture.")
@click.option("--to", "end", required=True, help="A prompt, or the path of a picture.")
@click.option("--frames", default=9, show_default=True, type=click.IntRange(2))
@click.option(
    "--kind",
    default="lerp",
    show_default=True,
    type=click.Choice(["lerp", "slerp"]),
    help="Straight line or great circle.",
)
@mixes_latents
@click.option("--fps", default=8.0, show_default=True, type=click.FloatRange(0.1, 60), help="Frames per second.")
def command(
    use: Use,
    start: str, end: str, frames: int, kind: str, noise: str, mean: bool, fps: float,
) -> None:  # fmt: skip
    """Walk from one source to another in the latent space; a picture of another size than the first is cropped and
    resized to it.

    Writes what the task makes of every frame and, of pictures, a grid, an animated GIF and (with the extra `video`) an
    MP4.

    \b
      crossflow interpolate --checkpoint runs/t2i_tiny --from "a red cube" --to "a blue sphere" --frames 16
      crossflow interpolate --checkpoint runs/depth_tiny --from one.jpg --to other.jpg --kind slerp
    """
    from crossflow.engine import latents

    pipe = use.pipe
    ends = read_typed(pipe, start), read_typed(pipe, end)
    with progress_bar("walking") as on_step:
        results = latents.interpolate(
            pipe,
            *ends,
            frames,
            kind=kind,
            seed=use.seed,
            shared_noise=noise == "shared",
            output_type="np",
            on_step=on_step,
            **use.settings | ({"mode": True} if mean else {}),
        )
    names = [f"{index / (frames - 1):.2f}" for index in range(frames)]
    folder = use.output or Path("outputs") / "interpolate"
    about: dict[str, Any] = {"from": start, "to": end, "kind": kind, "noise": noise, "mean": mean}
    write_all(use, results, names, folder, **about)
    animate(use, results, folder, fps)
