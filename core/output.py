"""Folders of results: a command writes to a new or empty folder, or replaces earlier results with `overwrite`.

A folder of results contains ``.crossflow.json`` with the names of the files written there, so overwriting removes only
these.

    with output_folder(Path("outputs/t2i")) as folder:  # outputs/t2i, or outputs/t2i-2, ... if it is not empty
        save_png(picture, folder / "0000.png")
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.core.files import is_temporary, write_atomically
from crossflow.core.lock import LOCK

RECORD = ".crossflow.json"


def check_output(requested: Path | None, *, overwrite: bool | None = False) -> None:
    """Raises UserError when a requested file exists, or a requested folder is not empty, unless `overwrite`; None is
    for commands without that option. Call it before the work whose results go there.
    """
    if requested is None or not requested.exists() or overwrite:
        return
    if requested.is_file():
        replace = "remove it first" if overwrite is None else "--overwrite to replace it"
        raise UserError(f"{requested} exists. Give another path, or {replace}.")
    if not _is_empty(requested):
        replace = (
            "empty it first."
            if overwrite is None
            else "--overwrite to replace the results in it; files that crossflow did not write there are kept."
        )
        raise UserError(f"The folder {requested} is not empty. Give another --output, or {replace}")


def claim(
    default: Path,
    requested: Path | None = None,
    *,
    overwrite: bool = False,
    resumable: Callable[[Path], bool] | None = None,
) -> Path:
    """Creates and returns the folder for the results of a command.

    requested: the folder named by the user; None means `default`, or default-2, default-3, ... if it is not empty.
    overwrite: earlier results in the folder are removed, and `default` is not numbered.
    resumable(folder): whether a folder holds unfinished work to continue; such a folder is returned unchanged.
    Raises UserError for a requested folder that is not empty, and for a file in its place.
    """
    number = 1
    while True:
        folder = requested or _numbered(default, number)
        if folder.is_file() and requested is not None:
            raise UserError(f"{folder} is a file, but the results need a folder. Give another --output.")
        if resumable is not None and folder.is_dir() and resumable(folder):
            return folder
        if overwrite and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _remove_recorded(folder)
            return folder
        check_output(requested)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # a process started at the same time may have created it
            if folder.is_dir() and _is_empty(folder):
                return folder
        number += 1


def planned(default: Path, requested: Path | None = None, *, overwrite: bool = False) -> Path:
    """The folder that `claim` would create at this moment; nothing is created."""
    if requested is not None or overwrite:
        return requested or default
    number = 1
    while (folder := _numbered(default, number)).exists() and not (folder.is_dir() and _is_empty(folder)):
        number += 1
    return folder


def _numbered(default: Path, number: int) -> Path:
    return default if number == 1 else default.with_name(f"{default.name}-{number}")


@contextmanager
def output_folder(default: Path, requested: Path | None = None, *, overwrite: bool = False) -> Iterator[Path]:
    """`claim`s a folder for the body to write to, and records the files written, even when the body fails. The folder
    is removed if it is still empty. Arguments and errors are those of `claim`.
    """
    folder = claim(default, requested, overwrite=overwrite)
    before = output_files(folder)
    try:
        yield folder
    finally:
        record(folder, output_files(folder) - before)
        if not any(folder.iterdir()):
            folder.rmdir()


def record(folder: Path, names: set[str]) -> None:
    """Records files (paths relative to the folder) as results that `claim` may remove, in addition to earlier ones."""
    names = names | set(_recorded(folder))
    if names:
        write_atomically(folder / RECORD, json.dumps({"files": sorted(names)}, indent=1) + "\n")


def output_files(folder: Path) -> set[str]:
    """Paths, relative to the folder, of all files in and below it, except the record."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}


def _is_empty(folder: Path) -> bool:
    """Whether a folder contains nothing but what a killed process left."""
    return all(path.name == LOCK or is_temporary(path) for path in folder.iterdir())


def _recorded(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} is damaged. Give another --output, or empty the folder.") from error
    return [str(name) for name in names]


def _remove_recorded(folder: Path) -> None:
    """Removes the recorded files and the subfolders that are then empty; nothing outside the folder."""
    parents = set()
    for name in _recorded(folder):
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            path.unlink()
            parents |= set(path.relative_to(folder).parents) - {Path(".")}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        if not any((folder / parent).iterdir()):
            (folder / parent).rmdir()
    (folder / RECORD).unlink(missing_ok=True)
