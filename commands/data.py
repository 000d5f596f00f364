"""``crossflow data check``: a data set before anything is trained on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.console import progress_bar, say, warn_each
from crossflow.core.errors import UserError
from crossflow.core.output import check_output, output_folder

if TYPE_CHECKING:
    from crossflow.data.check import Inspection


@click.group("data", short_help="Inspect data before training on them.")
def command() -> None:
    """Inspect data before training on them."""


@command.command("check")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=options.ANY_SPLIT,
    help="Repeatable. Default: those of train, val and test that the data have.",
)
@click.option("--num", type=click.IntRange(1), help="Maximum number of items per split, spread over it. Default: all.")
@click.option("--shown", default=24, show_default=True, type=click.IntRange(0), help="Pictures on the contact sheet.")
@click.option(
    "--max-bad",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Largest accepted share of bad items.",
)
@options.output_folder("outputs/data")
@options.overwrite
def check(
    spec: str, splits: Sequence[str], num: int | None, shown: int, max_bad: float, output: Path | None, overwrite: bool
) -> None:
    """Read every item of a data set: counts, sizes, bad items with their reasons, a contact sheet.

    \b
      crossflow data check coco:~/flickr8k
      crossflow data check kitti:~/kitti --split test
      crossflow data check "wds:shards/{00000..00009}.tar" --num 1000

    Writes SPLIT.json, SPLIT.png (the sheet) and SPLIT_bad.tsv (the bad items). The exit status is 2 when a split has a
    larger share of bad items than --max-bad, at which a training would stop too.
    """
    from crossflow.data.check import inspect, open_splits, shared_ids, write

    check_output(output, overwrite=overwrite)
    readers, refused = open_splits(spec, splits, limit=num), []
    with output_folder(Path("outputs/data"), output, overwrite=overwrite) as folder:
        say(f"Reading {spec} ({', '.join(readers)}). Results go to {folder}.")
        for split, reader in readers.items():
            with progress_bar(f"reading {split}") as on_step:
                inspection = inspect(reader, num_shown=shown, progress=on_step)
            files = write(inspection, folder)
            _show(inspection, split, folder)
            say(f"  Wrote {', '.join(map(str, files))}.")
            if len(inspection.bad) > max_bad * inspection.total:
                refused.append(f"{len(inspection.bad)} of the {inspection.total} items of {split}")
    for (split, other), ids in shared_ids(readers).items():
        say(f"note: {len(ids)} items are in both {split} and {other}, such as {ids[0]}.")
    if refused:
        raise UserError(f"{spec!r}: {' and '.join(refused)} are bad; the limit is {max_bad:.0%} (--max-bad).")


def _show(inspection: "Inspection", split: str, folder: Path) -> None:
    fields = ", ".join(inspection.fields)
    say(f"{inspection.spec} ({split}): {inspection.good} of {inspection.total} items are good; fields: {fields}.")
    for name, value in (*inspection.numbers.items(), ("fingerprint", inspection.fingerprint)):
        say(f"  {name:18}{value}")
    warn_each([f"bad {id}: {reason}" for id, reason in inspection.bad.items()], f"in {folder / f'{split}_bad.tsv'}")
