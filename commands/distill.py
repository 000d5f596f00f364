"""``crossflow distill``: a run that needs few steps, from a trained one."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say
from crossflow.core.errors import UserError


@click.command("distill", short_help="Train a run of 1 to 4 steps from a trained one.")
@click.argument("source", metavar="RUN")
@click.option("--output", type=options.PATH, help="New run directory. Default: runs/RUN_distilled, numbered if taken.")
@click.option(
    "--method",
    type=options.Choice(["composition", "derivative", "reflow"]),
    default="composition",
    show_default=True,
    help="Two kinds of flow maps, or the same kind of run with straighter paths.",
)
@click.option(
    "--guidance",
    metavar="W|LOW:HIGH",
    help="Guidance scale that is built in, or a range, which becomes an input. Default: the scale of RUN.",
)
@click.option("--data", help="Training data. Default: that of RUN.")
@options.settings
def command(
    source: str, output: Path | None, method: str, guidance: str | None, data: str | None, overrides: Sequence[str]
) -> None:
    """Train a run of 1 to 4 steps from a trained RUN (a run directory, converted released weights, or a hub id).

    \b
      crossflow distill runs/t2i_small
      crossflow sample --checkpoint runs/t2i_small_distilled --prompt "a red cube" --steps 2
      crossflow distill runs/t2i_small --guidance 1:8                  the scale stays free: --guidance 6
      crossflow distill runs/released --data coco:~/coco train.steps=20000 train.lr=1e-5
      crossflow distill runs/released --data coco:~/coco --method derivative interval.derivative=jvp
      crossflow distill runs/t2i_small --method reflow                 the baseline

    The new run starts from RUN's weights and keeps its source encoder, tokenizer and codec. Guidance is built in, so
    that each step is a single evaluation. By default it trains half as many steps as RUN; a stopped one continues with
    `crossflow train --output DIR --resume auto`. KEY=VALUE overrides any setting. See docs/few_steps.md.
    """
    from crossflow.commands.train import train_into
    from crossflow.core import distributed
    from crossflow.engine.distill import distilled
    from crossflow.engine.folder import new_folder
    from crossflow.networks.hub import short_name

    settings = ([f"data.train={data}"] if data is not None else []) + list(overrides)
    config = distilled(source, method=method, guidance=_scales(guidance), overrides=settings)
    distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
    distributed.device()  # joins the processes of a launcher, if there are several
    name = f"{short_name(source)}_distilled"
    folder = output or distributed.on_main(lambda: new_folder(Path("runs"), name))
    if distributed.is_main():
        say(f"Using {source} ({config.task}) on {config.data.train}. The run goes to {folder}.")
    train_into(folder, config)


def _scales(text: str | None) -> tuple[float, float] | None:
    """`6` -> (6, 6), `1:8` -> (1, 8)."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError as error:
        raise UserError(f"--guidance {text} is neither a scale such as 6 nor a range such as 1:8.") from error
