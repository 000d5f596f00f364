"""``crossflow list``."""

import sys

import click

from crossflow.tasks import task_names


@click.command("list")
@click.argument("what", type=click.Choice(["tasks", "configs", "datasets", "protocols", "solvers", "backbones"]))
def command(what: str) -> None:
    """Names that can be used: tasks, configs, datasets, protocols, solvers, backbones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for row in names(what):
        table.add_row(*map(Text, row))  # as it is: brackets are no markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def names(what: str) -> list[tuple[str, ...]]:
    if what == "tasks":
        from crossflow.tasks.base import task_class

        return [
            (name, (sys.modules[task_class(name).__module__].__doc__ or "").splitlines()[0]) for name in task_names()
        ]
    if what == "configs":
        from crossflow.core.settings import shipped

        return [(name, path.read_text().splitlines()[0].lstrip("# ")) for name, path in shipped().items()]
    if what == "datasets":
        from crossflow.data.readers import READERS

        return [
            (
                name,
                "\n".join(
                    [
                        READERS.get(name).layout,
                        *(f"?{key}={option.describe()}" for key, option in READERS.get(name).options.items()),
                    ]
                ),
                "has " + ", ".join(sorted(READERS.get(name).offers)),
            )
            for name in READERS.names()
        ]
    if what == "protocols":
        from crossflow.benchmarks.evaluation.protocol import load_protocol, protocols

        known = [(name, load_protocol(name)) for name in protocols()]
        return [(name, one.task, one.title, one.layout or f"embedded: {one.data}") for name, one in known]
    if what == "solvers":
        from crossflow.core.solvers import SOLVERS

        return [(name, SOLVERS.get(name).summary) for name in SOLVERS.names()]
    from crossflow.core.backbones import size_tables

    return [
        (backbone, f"size {name}: depth {size.depth}, width {size.width}, {size.heads} heads")
        for backbone, sizes in size_tables().items()
        for name, size in sizes.items()
    ]
