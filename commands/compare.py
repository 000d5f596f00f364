"""``crossflow compare``: two evaluations side by side."""

from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import print_table, say


@click.command("compare")
@click.argument("first", type=options.PATH)
@click.argument("second", type=options.PATH)
def command(first: Path, second: Path) -> None:
    """Two evaluations side by side: their numbers, and everything in which they differ.

    FIRST and SECOND are metrics.json files, or the folders that hold them.

    \b
      crossflow compare runs/a/evaluation/set5-x4-Set5-all-euler1 runs/b/evaluation/set5-x4-Set5-all-euler1
    """
    from crossflow.benchmarks.evaluation.compare import compare_scores, differences, read_evaluation

    left, right = read_evaluation(first), read_evaluation(second)
    rows = [(name, f"{a:.5g}", f"{b:.5g}", f"{b - a:+.3g}", note) for name, a, b, note in compare_scores(left, right)]
    print_table(rows, ("score", "first", "second", "difference", ""))
    differing = differences(left.manifest, right.manifest)
    for meaning, lines in differing.items():
        say(f"{meaning}:")
        for line in lines:
            say(f"  {line}")
    if not differing:
        say("The two evaluations agree in everything that the numbers depend on.")
