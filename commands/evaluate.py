"""``crossflow evaluate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands.checkpoint import Use, uses_checkpoint
from crossflow.commands.console import progress_bar, say, show_scores
from crossflow.core.errors import UserError


def _recall(context: click.Context, _: click.Parameter, value: str | None) -> Any:
    """The options of the evaluation that is repeated become the defaults of all others."""
    if value is None:
        return None
    from crossflow.benchmarks.evaluation.compare import options_of, read_evaluation

    before = read_evaluation(value)
    context.default_map = options_of(before.manifest)
    return before


@click.command("evaluate")
@uses_checkpoint(shared=True)
@click.option(
    "--protocol", "protocol_name", help="A name (crossflow list protocols) or a YAML file. Default: the task's rules."
)
@click.option("--data", help="Data to score on. Default: the run's own, or those embedded for the protocol.")
@click.option("--split", type=click.Choice(["train", "val", "test", "all"]), help="Default: test, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Items to score at most. Default: 1000, or all of the protocol.")
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="ROLE=SOURCE",
    help="Another network that measures, such as clip=FOLDER, features=inception=FILE, features=timm:resnet50.",
)
@click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Statistics of the real pictures, as crossflow statistics writes them.",
)
@click.option(
    "--repeat",
    is_eager=True,
    callback=_recall,
    metavar="MANIFEST",
    help="Measure again what this metrics.json says, and tell whether the numbers are the same.",
)
def command(
    use: Use,
    protocol_name: str | None,
    data: str | None,
    split: str | None,
    num: int | None,
    networks: Sequence[str],
    statistics: Path | None,
    repeat: Any,
) -> None:
    """Score a run on held-out data: metrics.json with its manifest, one row per item, and a page of pictures.

    \b
      crossflow evaluate --checkpoint runs/sr_small --protocol set5-x4 --data folder:~/Set5@all --steps 1
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --guidance 7
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --num 5000 \\
        --network features=timm:resnet50 --network clip=~/clip-vit-base-patch32
      crossflow evaluate --repeat runs/sr_small/evaluation/NAME/metrics.json

    A protocol fixes the split, the preparation of pictures and how each number is computed; the manifest tells all of
    it and the rest. Noise follows from the seed and the item's id, so neither batch_size=N nor the number of processes
    (torchrun, accelerate launch) changes the result. A killed evaluation goes on when the command is given again.
    """
    from crossflow.benchmarks.evaluation.compare import expect_repeated
    from crossflow.benchmarks.evaluation.evaluate import evaluate as run
    from crossflow.benchmarks.evaluation.protocol import load_protocol, protocol_of, roles

    pipe, protocol, settings, folder = use.pipe, None, use.settings, use.output
    if protocol_name is not None:
        protocol = load_protocol(protocol_name)
    elif repeat is not None and repeat.manifest.get("protocol"):
        protocol = protocol_of(repeat.manifest["protocol"])
    if networks:
        if protocol is None:
            raise UserError("--network replaces a network of a protocol; say which one by --protocol.")
        protocol = protocol.using(roles(networks))
    if repeat is not None:
        settings = {**repeat.manifest["sample"], **settings}
        folder = folder or repeat.path.parent / "repeated"
    with progress_bar("scoring") as on_step:
        report = run(
            pipe,
            spec=data,
            split=split,
            num=num,
            seed=use.seed,
            settings=settings,
            folder=folder,
            progress=lambda what, done, total: on_step(done, total),
            protocol=protocol,
            statistics=statistics,
            moved=use.moved,
        )
    if report is None:  # the first of several processes writes and tells
        return
    headline = pipe.task.headline if protocol is None else protocol.headline
    show_scores(report.scores.values, report.scores.intervals, report.baseline, headline)
    for note in report.scores.notes:
        say(f"note: {note}")
    say(f"Wrote {report.folder / 'metrics.json'} and the pictures beside it ({report.folder / 'index.html'}).")
    if repeat is not None:
        say(expect_repeated(repeat, report.scores.values, report.manifest))
