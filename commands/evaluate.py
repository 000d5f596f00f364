"""``crossflow evaluate``: scores of a run on held-out data, with their manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import join_processes, open_file, print_json, progress_bar, say, show_scores
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.benchmarks.evaluation.compare import Recorded
    from crossflow.benchmarks.evaluation.protocol import Protocol


def _repeat(context: click.Context, _: click.Parameter, manifest: str | None) -> "Recorded | None":
    """Reads the evaluation to be repeated; its options become the defaults of all others."""
    if manifest is None:
        return None
    from crossflow.benchmarks.evaluation.compare import options_of, read_evaluation

    earlier = read_evaluation(manifest)
    context.default_map = options_of(earlier.manifest)
    return earlier


@click.command("evaluate", short_help="Score a run on held-out data, with pictures.")
@uses_model("RUN/evaluation/NAME (named after data and settings)", shared=True)
@click.option(
    "--protocol", "protocol_name", help="Name (crossflow list protocols) or YAML file. Default: the task's own rules."
)
@click.option("--data", help="Data to score on. Default: the run's own, or those embedded for the protocol.")
@click.option("--split", type=options.ANY_SPLIT, help="Default: test, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Maximum number of items. Default: 1000, or all of the protocol.")
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="ROLE=SOURCE",
    help="Another measuring network: clip=FOLDER, features=inception=FILE, features=timm:resnet50, ...; repeatable.",
)
@click.option(
    "--statistics",
    type=options.EXISTING_FILE,
    help="Statistics of the real pictures, as crossflow statistics writes them.",
)
@click.option(
    "--repeat",
    is_eager=True,
    callback=_repeat,
    metavar="MANIFEST",
    help="Measure what this metrics.json records again, and report whether the numbers are the same.",
)
@options.as_json
def command(
    model: Model, protocol_name: str | None, data: str | None, split: str | None, num: int | None,
    networks: Sequence[str], statistics: Path | None, repeat: "Recorded | None",
    as_json: bool,
) -> None:  # fmt: skip
    """Score a run on held-out data: metrics.json with its manifest, one row per item, and a page of pictures.

    \b
      crossflow evaluate --checkpoint runs/sr_small --protocol set5-x4 --data folder:~/Set5@all --steps 1
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --guidance 7
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --num 5000 \\
        --network features=timm:resnet50 --network clip=~/clip-vit-base-patch32
      crossflow evaluate --repeat runs/sr_small/evaluation/NAME/metrics.json

    A protocol fixes the split, the preparation of pictures and how each number is computed; the manifest records these
    and everything else that a number depends on. Noise depends on the seed and the item's id alone, so neither
    batch_size=N nor the number of processes (torchrun, accelerate launch) changes the result. A killed evaluation
    continues when the same command is given again.
    """
    from crossflow.benchmarks.evaluation.compare import expect_repeated
    from crossflow.benchmarks.evaluation.evaluate import Evaluation

    join_processes()
    protocol = _protocol(protocol_name, networks, repeat)
    model = model if protocol is None else model.of_task(protocol.task)
    settings = model.settings if repeat is None else {**repeat.manifest["sample"], **model.settings}
    default = None if repeat is None else repeat.path.parent / "repeated"
    evaluation = Evaluation.open(
        model.pipe, protocol=protocol, spec=data, split=split, num=num, seed=model.seed, settings=settings,
        moved=model.replaced,
    )  # fmt: skip
    with progress_bar("scoring") as on_step:
        real = evaluation.real_pictures(statistics, on_step)
        folder = evaluation.claim(model.output, default=default, overwrite=model.overwrite)
        model.announce(folder)
        report = evaluation.run(folder, real, on_step)
    if report is None:  # not the first of several processes
        return
    headline = model.pipe.task.Scoring.headline if protocol is None else protocol.headline
    if as_json:
        scores = report.scores
        print_json({"folder": str(report.folder), "scores": scores.values, "intervals": scores.intervals,
                    "baseline": report.baseline, "notes": scores.notes, "manifest": report.manifest})  # fmt: skip
    show_scores(report.scores.values, report.scores.intervals, report.baseline, headline)
    for note in report.scores.notes:
        say(f"note: {note}")
    say(f"Wrote {report.folder / 'metrics.json'} and the pictures beside it ({report.folder / 'index.html'}).")
    if model.open_result:
        open_file(report.folder / "index.html")
    if repeat is not None:
        say(expect_repeated(repeat, report.scores.values, report.manifest))


def _protocol(name: str | None, networks: Sequence[str], repeat: "Recorded | None") -> "Protocol | None":
    """The protocol by name, or that of the repeated evaluation, with its networks replaced."""
    from crossflow.benchmarks.evaluation.protocol import load_protocol, protocol_of, roles

    protocol = None
    if name is not None:
        protocol = load_protocol(name)
    elif repeat is not None and repeat.manifest.get("protocol"):
        protocol = protocol_of(repeat.manifest["protocol"])
    if networks and protocol is None:
        raise UserError("--network replaces a network of a protocol; name the protocol by --protocol.")
    return protocol.using(roles(networks)) if networks and protocol is not None else protocol
