"""The tasks, by name: the folders beside this file, and those that other packages register; from a name to the
adapter, the configuration of a recipe, the model of a run.

Names are known without importing a task or torch, so that `crossflow --help` answers at once.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.recipes import RECIPE_FOLDERS

if TYPE_CHECKING:
    from crossflow.core.config import Config
    from crossflow.core.model import CrossFlow
    from crossflow.tasks.base import Task

ENTRY_POINTS = "crossflow.tasks"
"""Group of entry points by which an installed package brings a task: `NAME = "package.module:Adapter"`. Its recipes lie
in the folder `recipes` beside the module.
"""
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Registered:
    adapter: "type | str"
    """The class, or "package.module:CLASS"."""


_registered: dict[str, _Registered] = {}


def register(name: str, adapter: type | str, recipes: Path | str | None = None) -> None:
    """Makes a task of another package known under `name`.

    Args:
        name: as in `crossflow train --task NAME`, and in the line `task: NAME` of its recipes.
        adapter: its subclass of `crossflow.tasks.base.Task`, or "package.module:CLASS", which is imported when needed.
        recipes: the folder of its recipes, which holds NAME_tiny.yaml.

    Raises UserError when another task has this name.
    """
    if name in task_names() and _registered.get(name) != _Registered(adapter):
        raise UserError(f"A task named {name!r} exists already. Register yours under another name.")
    _registered[name] = _Registered(adapter)
    if recipes is not None and Path(recipes) not in RECIPE_FOLDERS:
        RECIPE_FOLDERS.append(Path(recipes))


def unregister(name: str) -> None:
    """Forgets a task that `register` made known; its recipes stay readable."""
    _registered.pop(name, None)


def task_names() -> tuple[str, ...]:
    """The names of all tasks, sorted."""
    shipped = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    return tuple(sorted(shipped | set(_registered) | {point.name for point in _entry_points()}))


def adapter_of(name: str) -> type:
    """The class registered as `name`, imported now. `task_class` also checks it.

    Raises UserError with near names for an unknown one, and when the class cannot be imported.
    """
    if name in _registered:
        adapter = _registered[name].adapter
        return adapter if isinstance(adapter, type) else _imported(name, *adapter.split(":", 1))
    for point in _entry_points():
        if point.name == name:
            return _imported(name, point.module, point.attr or "Adapter")
    if name not in task_names():
        raise unknown_name("task", str(name), task_names())
    return _imported(name, f"{__name__}.{name}")


def _imported(task: str, module: str, attribute: str = "Adapter") -> type:
    try:
        adapter = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"The task {task!r} could not be imported from {module}: {error}.") from error
    if not isinstance(adapter, type):
        raise UserError(
            f"The task {task!r} needs a class named {attribute} in {module}, and the module has none. Rename its "
            "subclass of crossflow.tasks.base.Task."
        )
    return adapter


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return _entry_points_on(tuple(sys.path))


@functools.lru_cache(maxsize=1)  # reading what all installed packages declare takes most of the time of load_config
def _entry_points_on(path: tuple[str, ...]) -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=ENTRY_POINTS)


def add_recipes_of_packages() -> None:
    """Makes the recipes of tasks that installed packages bring readable by name."""
    for point in _entry_points():
        spec = importlib.util.find_spec(point.module)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "recipes"
            if folder.is_dir() and folder not in RECIPE_FOLDERS:
                RECIPE_FOLDERS.append(folder)


def task_class(name: str) -> "type[Task]":
    """The adapter of the task `name`. Raises UserError with near names, and for an adapter that is incomplete."""
    from crossflow.tasks.base import REQUIRED, Task

    adapter = adapter_of(name)
    where = f"{adapter.__module__}.{adapter.__qualname__}"
    if not issubclass(adapter, Task):
        raise UserError(f"The task {name!r} is registered with {where}, which is no subclass of Task.")
    missing = [word for word in REQUIRED if not hasattr(adapter, word)]
    missing += [word for word in ("Metric",) if not missing and not hasattr(adapter.Scoring, word)]
    if missing:
        raise UserError(f"The task {name!r} is incomplete: set {', '.join(missing)} on {where} or its Scoring.")
    if adapter.name != name:
        raise UserError(f"The task is registered as {name!r}, but {where}.name is {adapter.name!r}; use one name.")
    check_headline(adapter.Scoring.headline, adapter.Scoring.scores(adapter.Scoring.Rules()), f"the task {name}")
    return adapter


def check_headline(headline: Sequence[str], scores: Sequence[str], owner: str) -> None:
    """Raises UserError when a headline names a score that does not exist."""
    wrong = [name for name in headline if name not in scores]
    if wrong:
        raise UserError(
            f"The headline of {owner} names {', '.join(map(repr, wrong))}, which its metric does not compute. Its "
            f"scores are {', '.join(scores)}."
        )


def tasks_of(value: object) -> tuple[str, ...]:
    """The names in the line `task` of a configuration: one, or those of a joint run, separated by commas.

    >>> tasks_of("t2i, caption")
    ('t2i', 'caption')
    """
    return tuple(word.strip() for word in str(value).split(",") if word.strip())


def load_config(source: str | Path, overrides: Sequence[str] = (), task: str | None = None) -> "Config":
    """The complete configuration of a recipe (a name, a file, or a run directory) with key=value overrides.

    Raises UserError for unknown recipes, tasks, keys and values, and when the recipe belongs to another `task`.
    """
    from crossflow.core.settings import build, merge, parse_overrides, read, shipped

    add_recipes_of_packages()
    if task is not None and str(source) == f"{task}_tiny" and task in task_names() and str(source) not in shipped():
        raise UserError(
            f"The task {task!r} has no recipe {task}_tiny, which `--task {task}` trains. Register the folder that "
            f"holds {task}_tiny.yaml with it, or give --config with a recipe file."
        )
    settings = merge(read(source), parse_overrides(overrides))
    name = settings.get("task")
    if name is None:
        raise UserError(
            f"The configuration {source} does not name its task. Add a line `task: "
            f"t2i`, or another of {', '.join(task_names())}."
        )
    if len(tasks_of(name)) > 1:
        raise UserError(
            f"{source} is of several tasks, {', '.join(tasks_of(name))}, and this needs one of them. `crossflow train` "
            "trains them together; of such a run name a task by --task, or by its folder tasks/NAME in the run "
            "directory."
        )
    if task is not None and name != task:
        raise UserError(
            f"The configuration {source} belongs to the task {name!r}, but --task says {task!r}. Leave out one of "
            "the two."
        )
    return build(task_class(name).Config, settings)


def load_model(folder: Path, *, weights: str | None = None, overrides: Sequence[str] = ()) -> "tuple[Task, CrossFlow]":
    """The task and the model of a run directory, or of a task of a joint run, on the CPU.

    weights: ema | model; None: ema where the run has them. overrides: key=value settings that replace the run's. Raises
    UserError when files are missing, damaged, or do not fit.
    """
    from crossflow.core.weights import kind_of_weights
    from crossflow.networks.run_weights import load_run

    config = load_config(folder, overrides)
    kind = kind_of_weights(folder, weights)
    task = task_class(config.task).load(config, folder)
    return task, load_run(task.build_model, folder, kind, config.finetune)


def save_model(task: "Task", model: "CrossFlow", folder: Path, kinds: Sequence[str] = ("model",)) -> None:
    """Writes configuration, weights and parts into `folder`, which `load_model` reads; all weights are written."""
    from crossflow.core.config import FinetuneConfig
    from crossflow.core.files import write_atomically, write_tensors
    from crossflow.core.settings import dump
    from crossflow.core.weights import WEIGHTS

    folder.mkdir(parents=True, exist_ok=True)
    whole = task.config.model_copy(update={"finetune": FinetuneConfig()})
    write_atomically(folder / "config.yaml", dump(whole))
    for kind in kinds:
        write_tensors(folder / WEIGHTS[kind], model.state_dict())
    task.parts.save(folder)
