"""Listings of many files, kept in the user's cache: made once, then mapped into memory by every process.

A listing is used again while the files and folders that it was made from have their sizes and modification times.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from crossflow.core.files import remove_temporaries
from crossflow.data.index import arrow
from crossflow.data.index.items import IndexedRecords, Rows
from crossflow.data.index.merge import BAD, CAPTIONS, CHUNK, PICTURE
from crossflow.data.index.store import Store, building, folder_of
from crossflow.data.item import Record

T = TypeVar("T")

VERSION = 1  # of the files; changes with their content
MANY = 20_000  # files of data whose listing is worth keeping
SETTLED = 2 * 10**9  # nanoseconds after which another change is sure to give another modification time
COLUMNS = {"id": "text", "image": "text", "captions": "texts", "problem": "text"}
WATCHED = {"path": "text", "state": "uint64"}


@dataclass(frozen=True)
class Kept:
    """A listing: the folder to which file names are relative, those in which files may lie, and the records."""

    root: Path
    allowed: tuple[Path, ...]
    records: Sequence[Record] | IndexedRecords


def kept(key: Sequence[object], spec: str, make: Callable[[], Kept], watched: Callable[[], Iterable[Path]]) -> Kept:
    """The listing that is kept under `key`, or that `make` returns, which is kept.

    Args:
        key: what identifies the listing beside the files.
        spec: of the data, for messages.
        make: returns the records in memory.
        watched: the files and folders whose change may change the listing.

    Raises:
        UserError: the index cannot be written; or as `make`.
    """
    store = Store(folder_of("listing", VERSION, *key))
    assert store.folder is not None
    listing = _open(store)
    if listing is None:
        with building(store.folder, spec):
            listing = _open(store) or _build(store, make, watched)  # another process may have been faster
    return listing


class ListingRows(Rows):
    """The records of a kept listing, by row."""

    def __init__(self, store: Store) -> None:
        assert store.folder is not None
        self.store = store
        self.rows = arrow.read(store.folder / "records.arrow")
        self.flags = self.array("flags")

    def name(self, row: int) -> str:
        """The id of a record."""
        return arrow.decode(self.rows["id"][row].as_py())

    def record(self, row: int) -> Record:
        """The record of a row."""
        image, problem = (arrow.decode(self.rows[name][row].as_py()) for name in ("image", "problem"))
        captions = tuple(arrow.decode(text) for text in self.rows["captions"][row].as_py())
        return Record(self.name(row), image, captions, problem=problem)

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"])  # type: ignore[misc]


def _open(store: Store) -> Kept | None:
    """The listing of a store; None when there is none, or when what it was made from has changed."""
    assert store.folder is not None
    try:
        about = json.loads(store.text("about") or "")
        rows = ListingRows(store)
        for batch in arrow.read(store.folder / "watched.arrow").to_batches():
            for path, state in zip(batch["path"].to_pylist(), batch["state"].to_pylist(), strict=True):
                if _state(arrow.decode(path))[0] != state:
                    return None
    except (OSError, ValueError, AssertionError):  # missing or damaged
        return None
    return Kept(
        Path(about["root"]), tuple(map(Path, about["allowed"])), IndexedRecords(rows, "all", range(len(rows.flags)))
    )


def _build(store: Store, make: Callable[[], Kept], watched: Callable[[], Iterable[Path]]) -> Kept:
    folder = store.folder
    assert folder is not None
    remove_temporaries(folder)
    store.put("about", "")  # incomplete until its last line
    start, newest = time.time_ns(), 0

    def states() -> "Iterator[Any]":
        nonlocal newest
        for paths in _batched(watched(), CHUNK):
            values = [_state(str(path)) for path in paths]
            newest = max(newest, *(changed for _, changed in values))
            names = [arrow.encode(os.path.abspath(path)) for path in paths]
            yield arrow.batch(WATCHED, [names, [state for state, _ in values]])

    arrow.write(folder / "watched.arrow", WATCHED, states())  # before the files are read, so that no change is missed
    listing = make()
    if newest > start - SETTLED:
        return listing  # a change at the same instant would go unnoticed
    flags = np.array([_flags(record) for record in listing.records], np.uint8)
    arrow.write(folder / "records.arrow", COLUMNS, map(_batch, _batched(listing.records, CHUNK)))
    store.put("flags", flags)
    store.put("about", json.dumps({"root": str(listing.root), "allowed": list(map(str, listing.allowed))}))
    return _open(store) or listing


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part


def _batch(records: Sequence[Record]) -> Any:
    captions = [[arrow.encode(text) for text in record.captions] for record in records]
    ids, images, problems = (
        [arrow.encode(getattr(record, name)) for record in records] for name in ("id", "image", "problem")
    )
    return arrow.batch(COLUMNS, [ids, images, captions, problems])


def _flags(record: Record) -> int:
    return BAD * bool(record.problem) | PICTURE * bool(record.image) | CAPTIONS * bool(record.captions)


def _state(path: str) -> tuple[int, int]:
    """(a number that changes with the size and the modification time, the latter in nanoseconds); 0 without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return hash((status.st_size, status.st_mtime_ns, status.st_ino)) % 2**64, status.st_mtime_ns
