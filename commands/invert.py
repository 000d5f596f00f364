"""``crossflow invert``: from an output back to its source latent."""

from pathlib import Path

import click

from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import progress_bar, say
from crossflow.commands.inputs import typed_input
from crossflow.commands.outputs import numbered_results, write_results
from crossflow.core.errors import UserError
from crossflow.core.output import output_folder


@click.command("invert", short_help="Flow an output back to its source latent, and forward.")
@uses_model("outputs/invert")
@click.option(
    "--input", "value", required=True, help="An output of the task: a picture, a caption, a depth PNG in millimetres."
)
@click.option("--source", help="The input of that output; required by noise-source baselines only.")
def command(model: Model, value: str, source: str | None) -> None:
    """Flow an output back to its source latent, and forward again; writes the latent and the output re-generated
    from it, for pictures beside the input.

    \b
      crossflow invert --checkpoint runs/t2i_tiny --input outputs/t2i/0000.png --steps 50
      crossflow invert --checkpoint runs/t2i_tiny_distilled --input outputs/t2i/0000.png --steps 1
    """
    from crossflow.core.files import write_tensors
    from crossflow.engine import latents

    if set(model.settings) - {"solver", "steps"}:
        raise UserError("An inversion runs the plain flow backwards: it takes --solver and --steps only.")
    pipe = model.pipe
    settings = latents.inversion_settings(pipe, **model.settings).model_dump(include={"solver", "steps"})
    model.announce(model.planned(Path("outputs/invert")), guidance=1.0, **settings)
    try:
        with progress_bar("inverting") as on_step:
            inversion = latents.invert(
                pipe,
                value,
                source=typed_input(pipe, source),
                seed=model.seed,
                output_type="np",
                on_step=on_step,
                **settings,
            )
    except ValueError as error:  # of the readers of pictures and depth maps
        raise UserError(
            f"{value} cannot be inverted: {error}. Give an output of this {pipe.task.name} run; see "
            "`crossflow invert --help`."
        ) from error
    with output_folder(Path("outputs/invert"), model.output, overwrite=model.overwrite) as folder:
        results = numbered_results(inversion.outputs, ["input", "re-generated"], input=value, inversion=settings)
        write_results(model, results, folder)
        z0 = inversion.z0
        write_tensors(folder / "latent.safetensors", {"z0": z0})
        say(
            f"The source latent is {folder / 'latent.safetensors'}: mean {z0.mean():.3f}, deviation {z0.std():.3f}. "
            f"Root mean squared error of the re-generated latent: {inversion.error:.2g}."
        )
