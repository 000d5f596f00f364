"""Files that a data set names: which exist, which may be read, and which folder holds a list's images.

The names come from annotations written by others, so each is checked before its file is opened.
"""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from crossflow.core.files import write_array

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


def existing(location: str) -> Path | None:
    """The path with ~ expanded, or None when nothing exists there."""
    try:
        path = Path(location).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, the home of an unknown user, a NUL
        return None


def inside(root: Path, name: str, allowed: Collection[Path]) -> Path:
    """The file `name` under `root`.

    Neither `..` nor an absolute path nor a link may lead to the rest of the disk: the file must lie in one of the
    `allowed` folders (resolved paths). Raises ValueError with the reason otherwise.
    """
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not a file name")
    if leaves(name):
        raise ValueError(f"path {name!r} leaves the data folder; only paths below it are read")
    path = root / name
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"path {name!r} cannot be resolved: {error}") from error
    if not any(resolved.is_relative_to(folder) for folder in allowed):
        raise ValueError(f"{name!r} is a link that leaves the data folder; only files inside it are read")
    if not path.exists():
        raise ValueError(f"no such file: {name!r} in {str(root)!r}")
    if not path.is_file():
        raise ValueError(f"{name!r} is not a regular file")
    return path


def leaves(name: str) -> bool:
    """Whether the path `name` leads out of the folder that it is relative to; links are not considered."""
    pure = PurePosixPath(name)
    return pure.is_absolute() or ".." in pure.parts


def with_links(path: Path) -> tuple[Path, ...]:
    """`path` and the folders in it, each of which may be a link to the place that holds its files."""
    return (path, *(child for child in sorted(path.iterdir()) if child.is_dir()))


def image_files(folder: Path) -> list[str]:
    """The images below `folder` as sorted names relative to it. Hidden files and links to folders are left out."""
    names = []
    for parent, files, linked in walk(folder):
        if linked:
            logger.warning("%s: the linked folders %s are not followed.", parent, ", ".join(sorted(linked)))
        relative = parent.relative_to(folder)
        names += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(names)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(a folder, its files, its links to folders) for `folder` and those below it, without hidden and linked ones."""
    for parent, folders, files in os.walk(folder):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        yield Path(parent), files, linked


def has_many(folder: Path, number: int) -> bool:
    """Whether more than `number` files and folders lie below `folder`; no more of them are looked at."""
    count, folders = 0, [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                if count > number:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return False


def fullest_folder(candidates: Sequence[Path], names: Iterable[str]) -> Path:
    """The candidate that holds most of the first 20 names, the first one on a tie: the folder of a list's images."""
    first = list(islice((name for name in names if name and "\0" not in name and not leaves(name)), 20))
    present = [folder for folder in candidates if folder.is_dir()] or list(candidates[:1])
    return max(present, key=lambda folder: sum(os.path.isfile(folder / name) for name in first))


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array to the user's cache directory; logs a warning when that is not writable."""
    try:
        write_array(path, array)
    except OSError as error:
        logger.warning("%s cannot be written (%s), so it will be computed again.", path, error)
