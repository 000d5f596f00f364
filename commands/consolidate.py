"""``crossflow consolidate``: the whole weights of a sharded checkpoint, in its run directory."""

from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say


@click.command("consolidate", short_help="Write the whole weights of a sharded checkpoint.")
@click.argument("source", type=options.PATH)
def command(source: Path) -> None:
    """Write the whole weights of a sharded training's checkpoint to its run directory.

    SOURCE is a run directory, of which the newest checkpoint is taken, or one of its checkpoints. A training does this
    itself when it ends; with the command the weights of an unfinished one can be sampled and evaluated.

    \b
      crossflow consolidate runs/large
      crossflow consolidate runs/large/checkpoints/step_00020000
    """
    from crossflow.core.lock import FolderLock
    from crossflow.core.training.checkpoint import find_checkpoint, step_of
    from crossflow.core.training.saving import WEIGHTS
    from crossflow.core.training.shards import consolidate

    checkpoint = find_checkpoint(source, source)
    assert checkpoint is not None
    run = checkpoint.parent.parent
    with FolderLock(run):
        files = consolidate(checkpoint, WEIGHTS, run)
    say(f"Step {step_of(checkpoint)}: wrote {', '.join(str(file) for file in files)}.")
