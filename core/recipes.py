"""The folders of recipes and of shipped models.

This module imports nothing heavy, so the command line can list tasks quickly.
"""

from pathlib import Path

RECIPES = Path(__file__).parent.parent / "configs"
ZOO = Path(__file__).parent.parent / "zoo"
"""Its subfolders are the run directories of the models that ship with the package."""
RECIPE_FOLDERS: list[Path] = [RECIPES]
"""Folders whose recipes are known by name: the shipped folder, and those of tasks registered by other packages."""
