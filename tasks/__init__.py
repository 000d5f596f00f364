"""The tasks, by name: the folders beside this file, those that other packages register, and nothing else.

Names are known without importing a task, so that `crossflow --help` answers at once.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.recipes import RECIPE_FOLDERS

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
    """The class registered as `name`, imported now. `crossflow.tasks.base.task_class` also checks it.

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
    return metadata.entry_points(group=ENTRY_POINTS)


def add_recipes_of_packages() -> None:
    """Makes the recipes of tasks that installed packages bring readable by name."""
    for point in _entry_points():
        spec = importlib.util.find_spec(point.module)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "recipes"
            if folder.is_dir() and folder not in RECIPE_FOLDERS:
                RECIPE_FOLDERS.append(folder)
