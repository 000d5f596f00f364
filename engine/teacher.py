"""The trained run from which another one learns: its task, whose parts are shared, and its model (interval.teacher)."""

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.weights import kind_of_weights, load_weights
from crossflow.networks.hub import run_folder
from crossflow.tasks import load_config
from crossflow.tasks.base import Task


def taught_task(kind: type[Task], config: Config) -> Task | None:
    """The task of a run that learns from a teacher, with whose latents it works, and so with its tokenizer and codec;
    None without a teacher.

    Raises UserError for a teacher of another task.
    """
    source = config.interval.teacher
    if source is None:
        return None
    folder = run_folder(source)
    own = load_config(folder)
    if own.task != config.task:
        raise UserError(
            f"interval.teacher = {source} is a {own.task} run, and this is a {config.task} run. A teacher needs the "
            "same task."
        )
    return kind(config, kind.load(own, folder).parts)


def teacher_of(task: Task) -> CrossFlow | None:
    """The model of the teacher of `task`, with its averaged weights; None without a teacher."""
    source = task.config.interval.teacher
    if source is None:
        return None
    folder = run_folder(source)
    own = type(task)(load_config(folder), task.parts)
    return load_weights(own.build_model, folder, kind_of_weights(folder))
