"""``crossflow list``: the names that options accept."""

import re
import sys
from collections.abc import Callable, Sequence

import click

from crossflow.commands import options
from crossflow.commands.console import print_json, print_table
from crossflow.tasks import task_names

Row = tuple[str, ...]
Rows = Sequence[Row]


@click.command("list", short_help="Names that options accept: tasks, recipes, protocols.")
@click.argument(
    "what", type=options.Choice(["tasks", "configs", "models", "datasets", "protocols", "solvers", "backbones"])
)
@options.as_json
def command(what: str, as_json: bool) -> None:
    """Names that options accept: tasks, configs, models, datasets, protocols, solvers, backbones.

    \b
      crossflow list configs
      crossflow list models              that ship with the package, with their scores and an example of each
      crossflow list protocols --json
    """
    rows: dict[str, Callable[[], Rows]] = {
        "tasks": _tasks,
        "configs": _configs,
        "models": _models,
        "datasets": _datasets,
        "protocols": _protocols,
        "solvers": _solvers,
        "backbones": _backbones,
    }
    if as_json:
        print_json([{"name": name, "about": list(about)} for name, *about in rows[what]()])
    else:
        print_table(rows[what]())


def first_sentence(text: str) -> str:
    """The first sentence of a docstring or comment, in one line; a sentence may go over several lines."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])", paragraph)[0]


def _tasks() -> Rows:
    from crossflow.tasks import task_class

    return [(name, first_sentence(sys.modules[task_class(name).__module__].__doc__ or "")) for name in task_names()]


def _configs() -> Rows:
    from crossflow.core.settings import shipped

    rows: list[Row] = []
    for name, path in shipped().items():
        comment = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
        rows.append((name, first_sentence(comment[0].replace("#", " ") if comment else "")))
    return rows


def _models() -> Rows:
    from crossflow.engine.describe import describe
    from crossflow.networks.hub import SHIPPED, shipped_models

    rows: list[Row] = []
    for name, folder in shipped_models().items():
        run = describe(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        scores = [f"{key} {value:.3g}" for each in run.measurements[-1:] for key, value in each.leading().items()]
        example = [str(path) for path in run.samples[:1]]
        rows.append((SHIPPED + name, run.config.task, f"{size / 1e6:.1f} MB", "\n".join([", ".join(scores), *example])))
    return rows


def _datasets() -> Rows:
    from crossflow.data.readers import READERS

    rows: list[Row] = []
    for name in READERS.names():
        reader = READERS.get(name)
        options = [f"?{key}={option.describe()}" for key, option in reader.options.items()]
        rows.append((name, "\n".join([reader.layout, *options]), "has " + ", ".join(sorted(reader.offers))))
    return rows


def _protocols() -> Rows:
    from crossflow.benchmarks.evaluation.protocol import load_protocol, protocols

    loaded = [(name, load_protocol(name)) for name in protocols()]
    return [
        (name, protocol.task, protocol.title, protocol.layout or f"embedded: {protocol.data}")
        for name, protocol in loaded
    ]


def _solvers() -> Rows:
    from crossflow.core.solvers import SOLVERS

    return [(name, SOLVERS.get(name).summary) for name in SOLVERS.names()]


def _backbones() -> Rows:
    from crossflow.core.backbones import BACKBONES

    return [
        (backbone, f"size {name}: depth {size.depth}, width {size.width}, {size.heads} heads")
        for backbone in BACKBONES.names()
        for name, size in BACKBONES.get(backbone).sizes.items()
    ]
