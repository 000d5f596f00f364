"""``crossflow arithmetic``: sums and differences of source latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands import options
from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import progress_bar
from crossflow.commands.inputs import typed_inputs
from crossflow.commands.outputs import numbered_results, write_results
from crossflow.core.errors import UserError
from crossflow.core.output import output_folder


@click.command("arithmetic", short_help="Latent arithmetic: base + k (plus - minus).")
@uses_model("outputs/arithmetic")
@click.option("--base", required=True, help="Prompt, or path of a picture.")
@click.option("--plus", help="Prompt or picture to add.")
@click.option("--minus", help="Prompt or picture to subtract.")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    type=float,
    default=(1.0,),
    show_default=True,
    help="k of base + k (plus - minus); repeatable.",
)
@click.option(
    "--restandardise",
    is_flag=True,
    help="Bring the result to mean 0 and deviation 1 over its whole latent, as the released demo does.",
)
@options.latent_noise
@options.latent_means
def command(
    model: Model,
    base: str, plus: str | None, minus: str | None,
    strengths: Sequence[float], restandardise: bool, noise: str, mean: bool,
) -> None:  # fmt: skip
    """Latent arithmetic: base + k (plus - minus), with --plus, --minus or both.

    \b
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --minus red --plus blue --strength 0.5
      --strength 1
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --plus "a blue sphere" --restandardise

    The output for the base itself comes first.
    """
    from crossflow.engine import latents

    if plus is None and minus is None:
        raise UserError("Latent arithmetic needs something to add or to subtract: give --plus, --minus, or both.")
    pipe = model.pipe
    model.announce(model.planned(Path("outputs/arithmetic")))
    first, added, subtracted = typed_inputs(pipe, base, plus, minus)
    with progress_bar("computing") as on_step:
        results = latents.arithmetic(
            pipe,
            first,
            plus=added,
            minus=subtracted,
            strengths=(0.0, *strengths),
            restandardise=restandardise,
            seed=model.seed,
            shared_noise=noise == "shared",
            output_type="np",
            on_step=on_step,
            **model.settings | ({"mode": True} if mean else {}),
        )
    names = ["base", *(f"k = {k:g}" for k in strengths)]
    details: dict[str, Any] = {"base": base, "plus": plus, "minus": minus, "restandardise": restandardise}
    with output_folder(Path("outputs/arithmetic"), model.output, overwrite=model.overwrite) as folder:
        write_results(model, numbered_results(results, names, **details, noise=noise, mean=mean), folder)
