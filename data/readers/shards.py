"""Where tar shards lie: on this machine, or in a store that fsspec reads (s3://, gs://, https://), ahead of their use.

Remote shards are downloaded whole into the user's cache, which all processes of a machine share; the least recently
used ones make room for others.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from crossflow.core.errors import UserError
from crossflow.core.files import TEMPORARY, replacing, size_in_words, user_cache
from crossflow.data.files import existing
from crossflow.data.index.store import edges
from crossflow.data.splits import split_word

logger = logging.getLogger(__name__)

P = TypeVar("P", bound=PurePath)

WAITS = (1.0, 5.0, 30.0, 120.0)  # seconds before a failed download is tried again
ABANDONED = 86400  # seconds after which the download of a killed process is removed
NUM_DOWNLOADS = 4  # at the same time in one process
VERSION_FIELDS = ("size", "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")


class Shards(ABC):
    """Shards in a fixed order."""

    names: list[str]
    """Of each shard: its path below the folder of all, without `.tar`."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def version(self, number: int) -> str:
        """A text that changes with the place or the content of a shard. Raises OSError."""

    @abstractmethod
    def content_digest(self, number: int) -> bytes:
        """A digest of the content of a shard, wherever it lies, or of a part of it. Raises OSError."""

    @abstractmethod
    def path(self, number: int) -> Path:
        """The shard as a file on this machine. Raises OSError, or UserError when it cannot be downloaded."""

    @abstractmethod
    def size(self, number: int) -> int:
        """Bytes. Raises OSError."""

    @abstractmethod
    def ahead(self, numbers: Iterable[int]) -> None:
        """Begins to download shards that are needed soon, if they are not on this machine."""

    def open(self, number: int) -> BinaryIO:
        """The shard, opened. Raises as `path`."""
        for _ in range(3):
            try:
                return self.path(number).open("rb")
            except FileNotFoundError:
                continue  # another process has made room since
        return self.path(number).open("rb")


class LocalShards(Shards):
    """Shards on the disks of this machine."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        root = common_root(self.files)
        self.names = [file.relative_to(root).with_suffix("").as_posix() for file in self.files]

    def version(self, number: int) -> str:
        """Path, size and modification time."""
        status = self.files[number].stat()
        return f"{self.files[number]} {status.st_size} {status.st_mtime_ns}"

    def content_digest(self, number: int) -> bytes:
        """Of both ends of the file."""
        return edges(self.files[number])

    def path(self, number: int) -> Path:
        """The file."""
        return self.files[number]

    def size(self, number: int) -> int:
        """Bytes of the file."""
        return self.files[number].stat().st_size

    def ahead(self, numbers: Iterable[int]) -> None:
        """Does nothing: the files are here."""


class RemoteShards(Shards):
    """Shards in a store, copied into the user's cache when they are needed.

    Args:
        protocol: of fsspec, such as s3.
        urls: of the shards.
        keep: bytes of shards to keep in the cache.

    Raises:
        UserError: a shard cannot be reached.
    """

    def __init__(self, protocol: str, urls: Sequence[str], keep: float) -> None:
        self.protocol, self.urls, self.keep = protocol, list(urls), keep
        paths = [PurePosixPath(url.partition("://")[2]) for url in urls]
        root = common_root(paths)
        self.names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
        try:
            with ThreadPoolExecutor(16) as pool:
                self.facts: list[dict[str, Any]] = list(pool.map(self._facts, self.urls))
        except _errors() as error:
            raise UserError(f"The shards, such as {self.urls[0]}, cannot be reached: {_reason(error)}.") from error
        self.largest = max(1, *map(self.size, range(len(self.urls))))
        self._downloads = _Downloads()

    def expect_room(self, num_shards: int) -> None:
        """Raises UserError if fewer shards than this can be kept, which are in use at the same time."""
        needed = min(num_shards, len(self)) * self.largest
        if needed > self.keep:
            raise UserError(
                f"{size_in_words(self.keep)} of shards are kept on this machine, but {size_in_words(needed)} are "
                f"in use at the same time; those of {self.urls[0]} and the like have {size_in_words(self.largest)}. "
                "Raise it by '?keep=GIGABYTES', or shuffle among fewer shards by '?shuffle=NUMBER'."
            )

    def _facts(self, url: str) -> dict[str, Any]:
        facts = filesystem(self.protocol).info(url)
        return {name: str(facts[name]) for name in VERSION_FIELDS if facts.get(name) is not None}

    def version(self, number: int) -> str:
        """URL, and what the store says of the version."""
        return f"{self.urls[number]} {json.dumps(self.facts[number], sort_keys=True)}"

    def content_digest(self, number: int) -> bytes:
        """Of the checksum that the store gives, or of size and date."""
        return json.dumps(self.facts[number], sort_keys=True).encode()

    def size(self, number: int) -> int:
        """Bytes, as the store says; 0 when it does not."""
        return int(self.facts[number].get("size") or 0)

    def path(self, number: int) -> Path:
        """The shard in the cache, downloaded if it is not there."""
        file = self._file(number)
        if not file.is_file():
            self._download(number)
        os.utime(file)  # the files used last stay
        return file

    def _file(self, number: int) -> Path:
        name = hashlib.blake2b(self.version(number).encode(), digest_size=16).hexdigest()
        return user_cache() / "shards" / f"{name}.tar"

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begins to download shards that are needed soon, each once in a process."""
        if self._downloads.process != os.getpid():  # threads do not survive a fork
            self._downloads = _Downloads()
        for number in islice(numbers, int(min(self.keep // self.largest, len(self)))):  # others would be removed again
            if number not in self._downloads.numbers and not self._file(number).is_file():
                self._downloads.numbers.add(number)
                # As a daemon, so that a process can end while a download goes on.
                threading.Thread(target=self._download_ahead, args=(number, self._downloads), daemon=True).start()

    def _download_ahead(self, number: int, downloads: "_Downloads") -> None:
        with downloads.slots:
            try:
                self._download(number)
            except UserError as error:  # raised again when the shard is needed
                logger.warning("%s", error)
        downloads.numbers.discard(number)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_downloads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _downloads=_Downloads())

    def _download(self, number: int) -> None:
        from filelock import FileLock

        file = self._file(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            for wait in (*WAITS, None):
                if file.is_file():
                    return
                try:
                    self._receive(number, file)
                    return
                except _errors() as error:
                    if wait is None or isinstance(error, FileNotFoundError | PermissionError):
                        raise UserError(
                            f"{self.urls[number]} cannot be downloaded to {file.parent}: {_reason(error)}. A run "
                            "resumes where it stopped."
                        ) from error
                    logger.warning("%s: %s; trying again in %.0f s.", self.urls[number], _reason(error), wait)
                    time.sleep(wait)

    def _receive(self, number: int, file: Path) -> None:
        from filelock import FileLock

        room = FileLock(file.with_name("room.lock"))
        try:
            with replacing(file) as temporary:
                filesystem(self.protocol).get_file(self.urls[number], str(temporary))
                received, size = temporary.stat().st_size, self.size(number)
                if size and received != size:
                    raise OSError(f"{received} of {size} bytes arrived")
                room.acquire()  # until the file has its name, so that others count it
                self._make_room(received)
        finally:
            room.release()

    def _make_room(self, size: int) -> None:
        """Removes the least recently used shards until another one of `size` bytes fits."""
        known = {}
        for file in (user_cache() / "shards").glob("*.tar"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # another process has removed it
            if not file.name.startswith(TEMPORARY):
                known[file] = status
            elif time.time() - status.st_mtime > ABANDONED:
                file.unlink(missing_ok=True)
        total = sum(status.st_size for status in known.values())
        for file in sorted(known, key=lambda file: known[file].st_mtime_ns):
            if total + size <= self.keep:
                return
            total -= known[file].st_size
            file.unlink(missing_ok=True)


class _Downloads:
    """The downloads of a process that nobody waits for yet."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.numbers: set[int] = set()
        self.slots = threading.BoundedSemaphore(NUM_DOWNLOADS)


def filesystem(protocol: str) -> Any:
    """The file system of fsspec for a protocol; each process has its own. Raises UserError if a package is missing."""
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{protocol}:// cannot be read: {_reason(error)}.") from error


# A store's library raises its own classes, which exist only where that library is loaded.
STORE_ERRORS = (
    ("aiohttp.client_exceptions", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def _errors() -> tuple[type[Exception], ...]:
    """What reading from a store raises."""
    classes = (getattr(sys.modules[module], name) for module, name in STORE_ERRORS if module in sys.modules)
    return (OSError, ValueError, RuntimeError, *classes)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")


# -- the shards that a spec names


def open_shards(place: str, spec: str, keep: float, layout: str) -> Shards:
    """The shards that `place` names, in order. Raises UserError when none exist.

    keep: bytes of remote shards to keep on this machine; layout: what a place must look like, for messages.
    """
    protocol, colon, _ = place.partition("://")
    if place.startswith("pipe:"):
        raise UserError(
            f"{spec!r}: output of programs is not read; name the shards by a URL, such as s3://BUCKET/*.tar."
        )
    if colon:
        urls = _urls(protocol, place)
        _expect_shards([PurePosixPath(url) for url in urls], [], spec, layout)
        return RemoteShards(protocol, urls, keep)
    path = existing(place) if place else None
    if path is not None and path.is_dir():
        files = sorted(path.rglob("*.tar"))
    elif path is not None:
        files = [path]
    else:
        files = sorted(_pattern(place))
    _expect_shards(files, [file for file in files if not file.is_file()], spec, layout)
    return LocalShards([file.absolute() for file in files])


def _expect_shards(files: Sequence[PurePath], missing: Sequence[Path], spec: str, layout: str) -> None:
    zipped = [file for file in files if file.suffix != ".tar"]
    if zipped:
        raise UserError(
            f"{spec!r}: {zipped[0].name!r} is not a plain .tar file; compressed shards allow no random access."
        )
    if missing or not files:
        problem = f"{len(missing)} shards do not exist, such as {missing[0]}" if missing else "no .tar files"
        raise UserError(f"{spec!r}: {problem}. Expected {layout}.")


def _urls(protocol: str, place: str) -> list[str]:
    """The URLs of the shards in a folder, or those that braces and `*` stand for."""
    urls: list[str] = []
    system = filesystem(protocol)
    try:
        for name in _braces(place):
            if "*" in name:
                urls += [f"{protocol}://{_bare(path)}" for path in sorted(system.glob(name))]
            elif name.endswith("/") or not PurePosixPath(name).suffix:
                files = sorted(path for path in system.find(name) if path.endswith(".tar"))
                urls += [f"{protocol}://{_bare(path)}" for path in files]
            else:
                urls.append(name)
    except UserError:
        raise
    except _errors() as error:
        raise UserError(f"{place} cannot be listed: {_reason(error)}.") from error
    return urls


def _bare(path: str) -> str:
    """A path without its protocol, which only some file systems return."""
    return path.partition("://")[2] or path


def _braces(place: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return [name for name in braceexpand(place) if name]
    except ValueError as error:  # unbalanced braces
        raise UserError(f"{place!r} is not a valid brace pattern: {error}.") from error


def _pattern(place: str) -> list[Path]:
    """The files that brace patterns (`{00000..00099}`, `{a,b}`) and `*` stand for, missing ones of a range included."""
    files: list[Path] = []
    for name in _braces(place):
        path = Path(name).expanduser()
        if "*" in name:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files += anchor.glob(str(path.relative_to(path.anchor)) if path.is_absolute() else name)
        else:
            files.append(path)
    return files


def common_root(shards: Sequence[P]) -> P:
    """The folder above all shards; its parent when the folder itself is called train, val or test."""
    root = shards[0].parent
    while not all(shard.is_relative_to(root) for shard in shards):
        root = root.parent
    return root.parent if split_word(root.name) else root
