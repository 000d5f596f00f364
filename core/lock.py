"""The lock of a folder that one job at a time may write to: `.lock`, which the kernel releases when its holder dies.

    with FolderLock(Path("runs/mine")):
        ...  # a second process that comes here ends with a message that names this one

The file says who holds it, and is removed at the end; what a killed process leaves behind locks nothing.
"""

import errno
import json
import logging
import os
import socket
import sys
import time
import weakref
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Self

from crossflow.core.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


class FolderLock:
    """The lock of `folder`, not yet acquired. Processes forked by the holder do not hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: FileIO | None = None

    def acquire(self) -> None:
        """Locks the folder, which is made if necessary.

        Raises UserError if another job holds the lock, or if the folder cannot be written.
        """
        assert self._file is None, "the lock is held already"
        path = self.folder / LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = FileIO(path, "r+", opener=_open)
                if not _lock(file):
                    file.close()
                    raise UserError(_refusal(self.folder, path))
                if _is_at(file, path):
                    break
                file.close()  # the holder before has removed the file meanwhile
            file.truncate(0)
            file.write(json.dumps(_this_process()).encode())
        except OSError as error:
            raise UserError(
                f"The folder {self.folder} cannot be written ({error.strerror}). Make it writable, or choose another "
                "--output."
            ) from error
        self._file = file
        _held.add(self)
        _watch_forks()

    def release(self) -> None:
        """Unlocks the folder and removes the file; nothing happens if the lock is not held."""
        if self._file is not None:
            path = self.folder / LOCK
            if sys.platform != "win32" and _is_at(self._file, path):  # there an open file cannot be removed
                path.unlink()
            self._close()

    def fileno(self) -> int:
        """The descriptor of the held lock; a process that inherits it holds the lock as well."""
        assert self._file is not None, "the lock is not held"
        return self._file.fileno()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _open(path: str, flags: int) -> int:
    """The descriptor of a file that is made if it is missing, with its content kept."""
    return os.open(path, flags | os.O_CREAT, 0o644)


def _lock(file: FileIO) -> bool:
    """Locks an open file without waiting; False if another open file holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**30)  # beyond the content, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("This file system has no locks: make sure that no other process writes to %s.", file.name)
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _refusal(folder: Path, path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        words = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is only just writing its name
        words = "another process"
    return (
        f"The folder {folder} is in use by {words}: it, or a process that it started, is still running. Wait for it or "
        "end it, then start again; or choose another --output."
    )


@cache
def _watch_forks() -> None:
    """A forked process shares its parent's open files: a loader worker that outlives its parent would keep the lock."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for lock in list(_held):
        lock._close()
