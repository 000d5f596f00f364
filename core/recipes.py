"""Where recipes lie. Importing this costs nothing, so that the command line can list tasks at once."""

from pathlib import Path

RECIPES = Path(__file__).parent.parent / "configs"
RECIPE_FOLDERS: list[Path] = [RECIPES]
"""Folders whose recipes are known by name: the shipped one, and those of tasks that other packages register."""
