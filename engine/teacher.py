"""The trained run from which another one goes on: its task, whose parts are shared, and its model.

It is the teacher whose velocities are learned (interval.teacher), the base that is fine-tuned (finetune.base), or the
run whose parts are taken over (train.parts_from).
"""

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.weights import kind_of_weights
from crossflow.data.dataset import Examples
from crossflow.networks.hub import run_folder
from crossflow.networks.run_weights import load_run
from crossflow.tasks import load_config
from crossflow.tasks.base import Report, Task


def inherited_task(kind: type[Task], config: Config, data: Examples, report: Report) -> Task | None:
    """The task of a run that goes on from another one, with whose latents it works, and so with its tokenizer and
    codec; None for a run that begins anew.

    Raises UserError for a run of another task.
    """
    sources = {
        "interval.teacher": config.interval.teacher,
        "finetune.base": config.finetune.base,
        "train.parts_from": config.train.parts_from,
    }
    setting, source = next(((name, value) for name, value in sources.items() if value is not None), ("", None))
    if source is None:
        return None
    folder = run_folder(source)
    own = load_config(folder)
    if own.task != config.task:
        raise UserError(
            f"{setting} = {source} is a {own.task} run, and this is a {config.task} run. Name a run of the same task."
        )
    return kind(config, kind.load(own, folder).parts.revised(own, config, data, report))


def teacher_of(task: Task) -> CrossFlow | None:
    """The model of the teacher of `task`, with its averaged weights; None without a teacher."""
    source = task.config.interval.teacher
    if source is None:
        return None
    folder = run_folder(source)
    own = type(task)(load_config(folder), task.parts)
    return load_run(own.build_model, folder, kind_of_weights(folder), own.config.finetune)
