"""The items of an index as the records of a reader: rows are read from the mapped files when they are needed."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.files import remove_temporaries
from crossflow.data.index import arrow
from crossflow.data.index.lines import Parse, read_parts
from crossflow.data.index.merge import BAD, CAPTIONS, COLUMNS, PICTURE, Merged
from crossflow.data.index.store import Messages, Store, building, folder_of, identity
from crossflow.data.item import Record
from crossflow.data.records import REQUIRED, LazyIds, Records
from crossflow.data.splits import SPLIT_WORDS, choose

logger = logging.getLogger(__name__)

ROWS = "rows.arrow"
VERSION = 1  # of the files; changes with their content
LARGEST_IN_MEMORY = 2**22  # bytes of a file that is read faster than anything is looked up


class Rows(ABC):
    """Rows of a table that a store keeps, each of which is a record."""

    store: Store
    flags: np.ndarray
    """uint8 (rows,), see `merge`."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The id of a record."""

    @abstractmethod
    def record(self, row: int) -> Record:
        """The record of a row."""

    def array(self, name: str) -> np.ndarray:
        """A stored array: `flags`, or the rows of a split or of a limited selection, int64, ascending."""
        array = self.store.array(name)
        assert array is not None, name
        return array


class Index(Rows):
    """The images that a file with one JSON object per line names, each with the captions of all its lines.

    A file of up to 4 MiB is read into memory. The index of a larger one is built in the user's cache, once for all
    processes, and mapped into memory: opening it again takes some milliseconds.

    Args:
        file: the file.
        parse: what a line says.
        spec: of the data, for messages.
        version: of `parse`; changes with what it returns.

    Raises:
        UserError: the index cannot be written.
        OSError: the file cannot be read.
    """

    def __init__(self, file: Path, parse: Parse, spec: str, version: str) -> None:
        self.file, self.spec = file, spec
        if file.stat().st_size <= LARGEST_IN_MEMORY:
            self.store = Store()
            self.rows = self._build(parse)
        else:
            self.store = Store(folder_of(VERSION, version, identity(file)))
            self.rows = self._open() or self._build_once(parse)
        about = json.loads(self.store.text("about") or "{}")
        self.with_splits: bool = about["with_splits"]
        self.other_splits: dict[str, int] = about["other_splits"]
        self.num_images: dict[str, int] = about["num_images"]
        self.flags = self.array("flags")

    def _open(self) -> Any:
        """The rows that another process has built; None when the index is incomplete or damaged."""
        assert self.store.folder is not None
        if self.store.text("about") is None:
            return None
        try:
            json.loads(self.store.text("about") or "")
            rows = arrow.read(self.store.folder / ROWS)
        except (OSError, ValueError):
            rows = None
        if rows is None or any(self.store.array(name) is None for name in ("flags", *SPLIT_WORDS)):
            logger.warning("%s: its index in %s is damaged and is built again.", self.spec, self.store.folder)
            return None
        return rows

    def _build_once(self, parse: Parse) -> Any:
        folder = self.store.folder
        assert folder is not None
        with building(folder, self.spec):
            rows = self._open()  # another process may have been faster
            if rows is None:
                remove_temporaries(folder)
                rows = self._build(parse)
        return rows

    def _build(self, parse: Parse) -> Any:
        folder = self.store.folder
        progress = Messages(self.spec, "reading its lines into an index (only once)")
        parts = [part for part in read_parts(self.file, folder, parse, progress) if part.num_rows]
        merged = Merged(parts, self.file.name)
        if folder is None:
            rows = arrow.table(COLUMNS, merged.batches())
        else:
            rows = arrow.write(folder / ROWS, COLUMNS, merged.batches())
        for name, array in merged.arrays(rows).items():
            self.store.put(name, array)
        self.store.put("about", json.dumps(merged.about))  # the last one: it makes the index complete
        for path in folder.glob("part-*.arrow") if folder is not None else ():
            path.unlink()
        return rows

    def split(self, split: str) -> "IndexedRecords":
        """The images of a split, and the malformed lines, which belong to all splits."""
        return IndexedRecords(self, split, range(len(self.flags)) if split == "all" else self.array(split))

    def names(self) -> Iterator[str]:
        """The paths of the images."""
        return (self.name(row) for row in range(sum(self.num_images.values())))

    def name(self, row: int) -> str:
        """The path of an image, or the name of a malformed line."""
        return arrow.decode(self.rows["name"][row].as_py())

    def problem(self, row: int) -> str:
        """Why a row is bad, or ""."""
        return arrow.decode(self.rows["problem"][row].as_py())

    def record(self, row: int) -> Record:
        """The record of a row."""
        name = self.name(row)
        captions = tuple(arrow.decode(text) for text in self.rows["captions"][row].as_py())
        return Record(name, name if self.flags[row] & PICTURE else "", captions, problem=self.problem(row))

    def __getstate__(self) -> dict[str, Any]:
        mapped = {"rows": None, "flags": None} if self.store.folder is not None else {}
        return self.__dict__ | mapped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.store.folder is not None:
            self.rows, self.flags = arrow.read(self.store.folder / ROWS), self.array("flags")


class IndexedRecords(Records):
    """The records of some rows of an index.

    Args:
        index: the index.
        name: of the selection, among those of the index.
        rows: ascending.
        required: fields without which a record is bad.
    """

    def __init__(
        self, index: Rows, name: str, rows: Sequence[int] | np.ndarray, required: frozenset[str] = frozenset()
    ) -> None:
        self.index, self.name, self.rows, self.required = index, name, rows, required
        self.ids = _Ids(self)

    def __getitem__(self, place: int) -> Record:
        record = self.index.record(int(self.rows[place]))
        missing = [text for name, text in REQUIRED.items() if name in self.required and not getattr(record, name)]
        return replace(record, problem=record.problem or " and ".join(missing))

    def _flags(self) -> np.ndarray:
        """uint8 (records,)."""
        return self.index.flags[self.rows] if isinstance(self.rows, np.ndarray) else self.index.flags

    @property
    def fields(self) -> frozenset[str]:
        """The fields that any good record has."""
        flags = np.unique(self._flags())
        good = int(np.bitwise_or.reduce(flags[flags & BAD == 0], initial=0))
        return frozenset(name for name, flag in (("image", PICTURE), ("captions", CAPTIONS)) if good & flag)

    @property
    def problems(self) -> dict[str, str]:
        """The bad records: id -> reason."""
        flags = self._flags()
        bad = (flags & BAD) > 0
        if "captions" in self.required:
            bad |= (flags & CAPTIONS) == 0
        records = (self[place] for place in np.flatnonzero(bad).tolist())
        return {record.id: record.problem for record in records}

    def limited(self, limit: int, seed: int) -> "IndexedRecords":
        """`limit` records in their order, spread over all."""
        name = f"{self.name}-limit{limit}-seed{seed}"
        rows = self.index.store.array(name)
        if rows is None:
            rows = np.array([self.rows[place] for place in choose(self.ids, limit, seed)], np.int64)
            self.index.store.keep(name, rows)
        return IndexedRecords(self.index, name, rows, self.required)

    def requiring(self, fields: Collection[str]) -> "IndexedRecords":
        """The same records, in which those without one of `fields` are bad."""
        return IndexedRecords(self.index, self.name, self.rows, self.required | frozenset(fields))

    def keep(self, name: str, compute: Callable[[], str]) -> str:
        """The result of `compute`, kept in the index."""
        name = "-".join([self.name, *sorted(self.required), name])
        text = self.index.store.text(name)
        if text is None:
            text = compute()
            self.index.store.keep(name, text)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"rows": None} if isinstance(self.rows, np.memmap) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = self.rows if self.rows is not None else self.index.array(self.name)


class _Ids(LazyIds):
    """The names of records."""

    def __init__(self, records: IndexedRecords) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records.rows)

    def id_at(self, index: int) -> str:
        """The name of item `index`."""
        return self.records.index.name(int(self.records.rows[index]))
