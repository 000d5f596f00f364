"""A folder of the user's cache for what is computed once from data, and then read by every process.

Its name is a digest of what lies there (path, size, modification time, ends of the file) and of the reader, so a folder
never has to be updated: other data have another one.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.files import is_full, user_cache, write_array, write_atomically

logger = logging.getLogger(__name__)

EDGE = 65536  # bytes at either end of a file that identify it
SECONDS = 15  # between two messages about the progress


class Store:
    """Arrays and texts by name: files in `folder`, or in the memory of this process if there is none."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._arrays: dict[str, np.ndarray] = {}
        self._texts: dict[str, str] = {}

    def put(self, name: str, value: np.ndarray | str) -> None:
        """Keeps a value. Raises OSError when its file cannot be written."""
        self._arrays.pop(name, None)
        self._texts.pop(name, None)
        if self.folder is None:
            if isinstance(value, str):
                self._texts[name] = value
            else:
                self._arrays[name] = value
        elif isinstance(value, str):
            write_atomically(self.folder / f"{name}.txt", value)
        else:
            write_array(self.folder / f"{name}.npy", value)

    def array(self, name: str) -> np.ndarray | None:
        """An array, mapped from its file if there is a folder; None when it is missing or damaged."""
        if name not in self._arrays and self.folder is not None:
            try:
                self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return None
        return self._arrays.get(name)

    def text(self, name: str) -> str | None:
        """A text; None when it is missing or damaged."""
        if name not in self._texts and self.folder is not None:
            try:
                self._texts[name] = (self.folder / f"{name}.txt").read_text(encoding="utf-8")
            except (OSError, ValueError):
                return None
        return self._texts.get(name)

    def keep(self, name: str, value: np.ndarray | str) -> None:
        """As `put`, but a value that cannot be written is reported, and computed again by the next process."""
        try:
            self.put(name, value)
        except OSError as error:
            logger.warning("%s cannot be written to %s (%s).", name, self.folder, error)

    def __getstate__(self) -> dict[str, object]:
        """Without what another process reads from the files."""
        return self.__dict__ | ({"_arrays": {}, "_texts": {}} if self.folder is not None else {})


def folder_of(*parts: object) -> Path:
    """The folder in the user's cache for data that `parts` identify."""
    name = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "replace"), digest_size=16).hexdigest()
    return user_cache() / "index" / name


def identity(file: Path) -> str:
    """A text that changes with the place or the content of a file, without reading all of it. Raises OSError."""
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {edges(file).hex()}"


def edges(file: Path) -> bytes:
    """A digest of both ends of a file. Raises OSError."""
    with file.open("rb") as stream:
        head = stream.read(EDGE)
        stream.seek(max(0, file.stat().st_size - EDGE))
        return hashlib.blake2b(head + stream.read(), digest_size=16).digest()


@contextmanager
def building(folder: Path, spec: str) -> Iterator[None]:
    """Creates `folder` and makes other processes wait while the index of `spec` is built there.

    A killed process releases the lock. Raises UserError when the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            lock.acquire(timeout=2)
        except Timeout:
            logger.warning("%s: waiting for another process, which builds its index.", spec)
            lock.acquire()
        with lock:
            lock.release()  # `with` has acquired it a second time
            yield
    except OSError as error:
        reason = "the disk is full" if is_full(error) else error.strerror or str(error)
        raise UserError(
            f"The index of {spec!r} cannot be written to {folder} ({reason}). Make room there, or set "
            "XDG_CACHE_HOME to a folder on another disk; what was indexed before is kept."
        ) from error


class Messages:
    """Reports how much of a long computation is done, at most every 15 seconds, by the logger."""

    def __init__(self, spec: str, what: str) -> None:
        self.spec, self.what, self._last = spec, what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > SECONDS:
            self._last = time.monotonic()
            logger.warning("%s: %s, %.0f %% done.", self.spec, self.what, 100 * done / total)
