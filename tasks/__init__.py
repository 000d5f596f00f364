"""Task adapters between modalities and the core, and what turns them into runs."""

from pathlib import Path

NO_TASKS = ("common", "released")
"""Folders beside this file that several tasks share."""


def task_names() -> tuple[str, ...]:
    """Every task there is: the folders beside this file, but for what they share."""
    folders = (path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))
    return tuple(sorted(name for name in folders if name not in NO_TASKS))
