"""Types of options that several commands share."""

import click

from crossflow.core.errors import unknown_name
from crossflow.tasks import task_names


class TaskName(click.ParamType):
    """The name of a registered task; looked up when it is used, so that tasks may be registered at any time."""

    name = "task"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(task_names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself. Raises UserError with near names for an unknown task."""
        if value not in task_names():
            raise unknown_name("task", value, task_names())
        return value
