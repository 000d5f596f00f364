"""Task adapters between modalities and the core, and what turns them into runs."""

from pathlib import Path


def task_names() -> tuple[str, ...]:
    """Every task there is: the folders beside this file."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py")))
