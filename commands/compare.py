"""``crossflow compare``: two evaluations side by side."""

from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import print_json, print_table, say


@click.command("compare", short_help="Two evaluations side by side, with intervals.")
@click.argument("first", type=options.PATH)
@click.argument("second", type=options.PATH)
@options.as_json
def command(first: Path, second: Path, as_json: bool) -> None:
    """Two evaluations side by side: their numbers, and everything in which they differ.

    FIRST and SECOND are metrics.json files, or the folders that hold them.

    \b
      crossflow compare runs/a/evaluation/set5-x4-Set5-all-euler1 runs/b/evaluation/set5-x4-Set5-all-euler1
    """
    from crossflow.benchmarks.evaluation.compare import compare_scores, differences, read_evaluation

    left, right = read_evaluation(first), read_evaluation(second)
    scores, differing = compare_scores(left, right), differences(left.manifest, right.manifest)
    if as_json:
        names = ("score", "first", "second", "verdict")
        listed = [dict(zip(names, row, strict=True)) for row in scores]
        print_json({"first": str(left.path), "second": str(right.path), "scores": listed, "differences": differing})
        return
    rows = [(name, f"{a:.5g}", f"{b:.5g}", f"{b - a:+.3g}", note) for name, a, b, note in scores]
    print_table(rows, ("score", "first", "second", "difference", ""))
    for meaning, lines in differing.items():
        say(f"{meaning}:")
        for line in lines:
            say(f"  {line}")
    if not differing:
        say("The two evaluations agree in everything that the numbers depend on.")
