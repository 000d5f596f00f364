"""Absolute paths, which mean something on their author's machine alone, reduced to their last name for others."""

import re
from collections.abc import Mapping
from typing import Any

_PARTS = re.compile(r"( [+*] |\n)")
"""What stands between the parts of joined data: 20 * folder:/home/me/mine@all + scenes."""
_FOLDERS = re.compile(r"(^|[\s:=,\[('\"])(?:[A-Za-z]:[\\/]|~?/(?![/\s]))(?:.*[\\/])?(?=[^\\/])")
"""A root and the folders below it, at the beginning or behind a prefix or KEY=; not the // of an address."""


def without_folders(value: object) -> Any:
    """A copy of JSON content whose texts name files and folders without where they lie.

    /home/me/runs/first -> first, folder:/home/me/mine@all -> folder:mine@all; relative paths and addresses stay.
    """
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        return "".join(_FOLDERS.sub(r"\1", part) for part in _PARTS.split(value))
    return value
