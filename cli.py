"""The command line as a table: each command is one file in commands/, imported when it is used."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from crossflow import __version__
from crossflow.commands.console import explain, warn
from crossflow.core.errors import UserError, unknown_name

COMMANDS = (
    *("train", "finetune", "distill", "sample", "evaluate", "compare", "statistics"),
    *("interpolate", "arithmetic", "invert", "cache", "convert", "ablate", "benchmark", "data", "list"),
    *("show", "doctor", "plot", "demo", "consolidate", "export", "push", "completion"),
)
"""In the order of `crossflow --help`; ``commands/NAME.py`` holds the click command ``command``."""


class CommandTable(click.Group):
    """Imports a command's file when the command is used, and suggests near names for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command from its file. Raises UserError with near names for an unknown one."""
        if cmd_name not in COMMANDS:
            raise unknown_name("command", cmd_name, COMMANDS)
        command: click.Command = import_module(f"crossflow.commands.{cmd_name}").command
        return command


@click.group(cls=CommandTable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="crossflow")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback behind an error message.")
def table() -> None:
    """Noise-free cross-modal flow models: train, sample, evaluate. Exit status: 0 done, 2 something to correct.

    A source (a sentence, a photograph) becomes a latent of the target's shape, and a transformer flows it into the
    target (a picture, a caption, a depth map, a sharper picture).

    \b
      crossflow train --task t2i                          train on embedded data, no download
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube"
      crossflow evaluate --checkpoint runs/t2i_tiny       scores and a page of pictures
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command (by default that of the process) and returns its exit status: 0, 2 after a user's error, 130 after
    Ctrl-C. argv: the arguments without the program's name.
    """
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("CROSSFLOW_DEBUG", "") not in ("", "0")
    try:  # --debug may stand before or after the command
        table.main([word for word in arguments if word != "--debug"], prog_name="crossflow", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        warn("Interrupted.")
        return 130
    except (UserError, OSError, click.ClickException) as error:
        message = explain(error)
        if message is None:
            raise
        if debug:
            traceback.print_exception(error)
        warn(f"error: {message}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
