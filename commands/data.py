"""``crossflow data check``."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands.console import progress_bar, say, warn
from crossflow.core.errors import UserError


@click.group("data")
def command() -> None:
    """Look at data before anything is trained on them."""


@command.command(name="check")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(["train", "val", "test", "all"]),
    help="May be given several times. Default: those of train, val and test that the data have.",
)
@click.option("--num", type=click.IntRange(1), help="Items of each split at most, spread over it. Default: all.")
@click.option("--shown", default=24, show_default=True, type=click.IntRange(0), help="Pictures on the contact sheet.")
@click.option("--max-bad", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Share that may be bad.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("outputs/data"), show_default=True, help="Folder."
)
def check_data(spec: str, splits: Sequence[str], num: int | None, shown: int, max_bad: float, output: Path) -> None:
    """Read every item of a data set: counts, sizes, what is bad and why, a contact sheet.

    \b
      crossflow data check coco:~/flickr8k
      crossflow data check kitti:~/kitti --split test
      crossflow data check "wds:shards/{00000..00009}.tar" --num 1000

    Writes SPLIT.json, SPLIT.png (the sheet) and SPLIT_bad.tsv (the bad items with reasons) into --output. The exit
    status is 2 when more than --max-bad of the items of a split are bad, at which a training would stop too.
    """
    from crossflow.data.check import inspect, open_splits, shared_ids, write

    readers, refused = open_splits(spec, splits, limit=num), []
    for split, reader in readers.items():
        with progress_bar(f"reading {split}") as on_step:
            found = inspect(reader, num_shown=shown, on_progress=on_step)
        files = write(found, output)
        say(f"{found.spec} ({split}): {found.good} of {found.total} items are good; has {', '.join(found.fields)}.")
        for name, value in found.numbers.items():
            say(f"  {name:18}{value}")
        say(f"  {'fingerprint':18}{found.fingerprint}")
        for id, reason in list(found.bad.items())[:20]:
            warn(f"bad {id}: {reason}")
        if len(found.bad) > 20:
            warn(f"and {len(found.bad) - 20} more in {output / f'{split}_bad.tsv'}")
        say(f"  Wrote {', '.join(map(str, files))}.")
        if len(found.bad) > max_bad * found.total:
            refused.append(f"{len(found.bad)} of the {found.total} items of {split}")
    for (one, other), ids in shared_ids(readers).items():
        say(f"note: {len(ids)} items are in both {one} and {other}, such as {ids[0]}.")
    if refused:
        raise UserError(f"{spec!r}: {' and '.join(refused)} are bad, and at most {max_bad:.0%} may be (--max-bad).")
