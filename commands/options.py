"""Option types and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from crossflow.core.errors import unknown_name
from crossflow.tasks import task_names

Command = TypeVar("Command", bound=Callable[..., Any])


class TaskName(click.ParamType):
    """The name of a registered task; looked up when it is used, so that tasks may be registered at any time."""

    name = "task"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The choices as the help shows them."""
        return f"[{'|'.join(task_names())}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The tasks that begin so."""
        return [CompletionItem(name) for name in task_names() if name.startswith(incomplete)]

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself. Raises UserError with near names for an unknown task."""
        if value not in task_names():
            raise unknown_name("task", value, task_names())
        return value


class TaskNames(TaskName):
    """One task, or several separated by commas."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The choices as the help shows them."""
        return f"[{'|'.join(task_names())}],..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The names without spaces. Raises UserError with near names for an unknown task."""
        names = [super(TaskNames, self).convert(word.strip(), param, ctx) for word in value.split(",")]
        return ",".join(names)


class RecipeName(click.ParamType):
    """A shipped recipe, or a file; what it is shows when it is read."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shipped recipes that begin so, and files."""
        from crossflow.core.settings import shipped

        recipes = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
        return recipes or [CompletionItem(incomplete, type="file")]


class Choice(click.Choice[str]):
    """One of several words; the error for another one suggests near words."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word itself. Raises UserError with near words for an unknown one."""
        if value not in self.choices:
            what = "value" if param is None else param.human_readable_name
            if isinstance(param, click.Option):
                what = f"value of {max(param.opts, key=len)}"
            raise unknown_name(what, value, self.choices)
        return value


PATH = click.Path(path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ANY_SPLIT = Choice(["train", "val", "test", "all"])

PRECISIONS = ("float32", "bf16", "fp16")
device = click.option("--device", help="cpu, cuda, cuda:1, mps, ... Default: a GPU if there is one.")
compile = click.option(
    "--compile/--no-compile", default=False, help="Compile the networks; pays for many items. Default: no."
)
offload = click.option("--offload", is_flag=True, help="Keep frozen networks on the CPU while they are not used.")
COMPUTING = (
    device,
    click.option(
        "--precision",
        type=Choice(list(PRECISIONS)),
        help="Of matrix products. Default: bf16 on GPUs, and for large models on CPUs with AMX; else float32.",
    ),
    click.option("--batch", type=click.IntRange(1), help="Items computed together. Default: the recipe's."),
    compile,
    offload,
)
"""Where and how a trained model computes."""
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the results as JSON to stdout, and everything else to stderr."
)
open_result = click.option("--open", "open_result", is_flag=True, help="Show the result in the desktop's own viewer.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace earlier results in --output; other files are kept.")
settings = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def output_folder(default: str) -> Callable[[Command], Command]:
    """--output for a folder of results; default: how the help names the folder that is used without it."""
    return click.option("--output", type=PATH, help=f"Empty or new folder. Default: {default}, numbered if taken.")


latent_noise = click.option(
    "--noise",
    type=Choice(["shared", "own"]),
    default="shared",
    show_default=True,
    help="shared: samples take the same noise, so that they differ by their meaning alone; own: each its own.",
)
latent_means = click.option("--mean", is_flag=True, help="Take means of the source posteriors instead of samples.")
