"""``crossflow push``: a run on the hub."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import say


@click.command("push", short_help="Publish a run on the hub.")
@click.argument("run", type=options.PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--license", "licence", help="The hub's name of a licence: mit, apache-2.0, cc-by-4.0, ...")
@click.option("--base-model", metavar="OWNER/NAME", help="The model that this one was made from.")
@click.option("--text", default="", help="A paragraph under the title of the model card, in Markdown.")
@click.option("--private", is_flag=True, help="A repository that others cannot see.")
@click.option("--branch", help="Default: main.")
@click.option("--pull-request", is_flag=True, help="Open a pull request instead of writing to the branch.")
@click.option("--weights", type=options.Choice(["ema", "model"]), help="Default: the averaged ones (ema).")
@click.option(
    "--storage",
    type=options.Choice(["float32", "half", "int8"]),
    default="float32",
    show_default=True,
    help="How weights are stored: half takes half the space, int8 (a scale per row) a quarter.",
)
@click.option(
    "--set",
    "replaced",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a setting of the run, such as text.encoder=OWNER/NAME; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Write what would be published to --output, and publish nothing.")
@click.option("--output", type=options.PATH, help="Folder for --dry-run. Default: outputs/push.")
def command(
    run: Path, repository: str, licence: str | None, base_model: str | None, text: str, private: bool,
    branch: str | None, pull_request: bool, weights: str | None, storage: str, replaced: Sequence[str],
    dry_run: bool, output: Path | None,
) -> None:  # fmt: skip
    """Publish RUN on the hub as OWNER/NAME: the run directory with config.json and a model card.

    \b
      crossflow push runs/t2i_tiny me/t2i-tiny --license mit --dry-run
      crossflow push runs/t2i_tiny me/t2i-tiny --license mit
      crossflow sample --checkpoint me/t2i-tiny --prompt "a red cube"

    The card has the scores of the run's evaluations (also as model-index), pictures of its training, and what it was
    trained with. Log in first: `hf auth login`, or set HF_TOKEN. Checkpoints stay here.
    """
    from crossflow.core.output import check_output, output_folder
    from crossflow.engine.model_card import About
    from crossflow.engine.publish import complete, copy_run, push_run

    about = About(licence, base_model, repository, text)
    if not dry_run:
        say(f"Publishing {run} as {repository}.")
        address = push_run(run, repository, about=about, weights=weights, storage=storage, overrides=replaced,
                           private=private or None, branch=branch, create_pr=pull_request)  # fmt: skip
        say(f"Published: {address}")
        say(f"Use it: crossflow.load({repository!r}), or --checkpoint {repository} of any command.")
        return
    check_output(output, overwrite=None)
    with output_folder(Path("outputs/push"), output) as folder:
        complete(copy_run(run, folder, weights=weights, storage=storage, overrides=replaced), about, origin=run)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    say(f"Wrote what would be published as {repository} to {folder}: {', '.join(names)}.")
