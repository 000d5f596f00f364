"""``crossflow compare``."""

import sys
from pathlib import Path

import click

from crossflow.commands.console import say


@click.command("compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def command(first: Path, second: Path) -> None:
    """Two evaluations side by side: their numbers, and everything in which they differ.

    FIRST and SECOND are metrics.json files, or the folders that hold them.

    \b
      crossflow compare runs/a/evaluation/set5-x4-Set5-all-euler1 runs/b/evaluation/set5-x4-Set5-all-euler1
    """
    from rich.console import Console
    from rich.table import Table

    from crossflow.benchmarks.evaluation.compare import compare_scores, differences, read_evaluation

    one, other = read_evaluation(first), read_evaluation(second)
    table = Table("score", "first", "second", "difference", "")
    for name, a, b, word in compare_scores(one, other):
        table.add_row(name, f"{a:.5g}", f"{b:.5g}", f"{b - a:+.3g}", word)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    found = differences(one.manifest, other.manifest)
    for meaning, lines in found.items():
        say(f"{meaning}:")
        for line in lines:
            say(f"  {line}")
    if not found:
        say("Nothing that decides the numbers differs.")
