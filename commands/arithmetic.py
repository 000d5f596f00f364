"""``crossflow arithmetic``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands.checkpoint import Use, uses_checkpoint
from crossflow.commands.console import progress_bar
from crossflow.commands.inputs import read_typed
from crossflow.commands.outputs import mixes_latents, write_all


@click.command("arithmetic")
@uses_checkpoint()
@click.option("--base", required=True, help="A prompt, or the path of a picture.")
@click.option("--plus", help="What is added.")
@click.option("--minus", help="What is subtracted.")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    type=float,
    default=(1.0,),
    show_default=True,
    help="k of base + k (plus - minus); may be given several times.",
)
@click.option(
    "--restandardise",
    is_flag=True,
    help="Bring the result to mean 0 and deviation 1 over its whole latent, as the released demo does.",
)
@mixes_latents
def command(
    use: Use,
    base: str, plus: str | None, minus: str | None,
    strengths: Sequence[float], restandardise: bool, noise: str, mean: bool,
) -> None:  # fmt: skip
    """Latent arithmetic: base + k (plus - minus), with --plus, --minus or both.

    \b
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --minus red --plus blue --strength 0.5
      --strength 1
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --plus "a blue sphere" --restandardise
    """
    from crossflow.engine import latents

    pipe = use.pipe
    terms = {"plus": read_typed(pipe, plus), "minus": read_typed(pipe, minus)}
    with progress_bar("computing") as on_step:
        results = latents.arithmetic(
            pipe,
            read_typed(pipe, base),
            **terms,
            strengths=(0.0, *strengths),
            restandardise=restandardise,
            seed=use.seed,
            shared_noise=noise == "shared",
            output_type="np",
            on_step=on_step,
            **use.settings | ({"mode": True} if mean else {}),
        )
    folder = use.output or Path("outputs") / "arithmetic"
    about: dict[str, Any] = {"base": base, "plus": plus, "minus": minus, "restandardise": restandardise}
    write_all(use, results, ["base", *(f"k = {k:g}" for k in strengths)], folder, **about, noise=noise, mean=mean)
