"""``crossflow invert``."""

from pathlib import Path

import click

from crossflow.commands.checkpoint import Use, uses_checkpoint
from crossflow.commands.console import progress_bar, say
from crossflow.commands.inputs import read_typed
from crossflow.commands.outputs import write_all
from crossflow.core.errors import UserError


@click.command("invert")
@uses_checkpoint()
@click.option(
    "--input", "value", required=True, help="What the task makes: a picture, a caption, a depth PNG in millimetres."
)
@click.option("--source", help="The input it belongs to; only for noise-source baselines.")
def command(
    use: Use,
    value: str, source: str | None,
) -> None:  # fmt: skip
    """Flow an output back to its source latent, and forward again; writes the latent and what came of it."""
    from crossflow.core.files import write_tensors
    from crossflow.engine import latents

    pipe, given = use.pipe, {"solver": "heun", "steps": 50, **use.settings}
    if len(given) > 2:
        raise UserError(
            "An inversion runs the plain flow backwards: it takes --solver and --steps, and no other setting."
        )
    belongs_to = read_typed(pipe, source)
    try:
        with progress_bar("inverting") as on_step:
            inversion = latents.invert(
                pipe, value, source=belongs_to, seed=use.seed, output_type="np", on_step=on_step, **given
            )
    except ValueError as error:  # of the readers of pictures and depth maps
        raise UserError(
            f"{value} cannot be inverted: {error}. Give what this {pipe.task.name} run makes, see --help."
        ) from error
    folder = use.output or Path("outputs") / "invert"
    write_all(use, inversion.outputs, ["input", "re-generated"], folder, input=value, settings=given)
    z0 = inversion.z0
    write_tensors(folder / "latent.safetensors", {"z0": z0})
    say(f"The source latent is {folder / 'latent.safetensors'}: mean {z0.mean():.3f}, deviation {z0.std():.3f}. "
        f"Root mean squared error of the re-generated latent: {inversion.error:.2g}.")  # fmt: skip
