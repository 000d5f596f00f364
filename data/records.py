"""The records of a reader: what is known of its items before any file is read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import overload

from crossflow.data.item import Record
from crossflow.data.splits import choose

REQUIRED = {"captions": "has no caption", "depth": "has no depth"}
"""Why an item is bad that lacks a field which a task needs; a missing image is noticed when it is read."""


class LazyIds(Sequence[str]):
    """Ids that are built when they are read, because large data sets have millions of them.

    A subclass defines `__len__` and `id_at`.
    """

    @abstractmethod
    def id_at(self, index: int) -> str:
        """The id of item `index`, which is in range."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.id_at(place) for place in range(*index.indices(len(self)))]
        return self.id_at(index)

    def __iter__(self) -> Iterator[str]:
        return (self.id_at(index) for index in range(len(self)))


class Records(ABC):
    """Records in a fixed order, with unique ids."""

    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @property
    @abstractmethod
    def fields(self) -> frozenset[str]:
        """The fields that any good record has."""

    @property
    @abstractmethod
    def problems(self) -> dict[str, str]:
        """The bad records: id -> reason."""

    @abstractmethod
    def limited(self, limit: int, seed: int) -> "Records":
        """`limit` records in their order, spread over all; see `splits.choose`."""

    @abstractmethod
    def requiring(self, fields: Collection[str]) -> "Records":
        """The same records, in which those without one of `fields` are bad."""

    def keep(self, name: str, compute: Callable[[], str]) -> str:
        """The result of `compute`, which follows from these records and `name`; computed once where it can be kept."""
        return compute()


class ListedRecords(Records):
    """Records in memory."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.ids = [record.id for record in self.records]

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    @property
    def fields(self) -> frozenset[str]:
        """The fields that any good record has."""
        good = [record for record in self.records if not record.problem]
        present = {
            "image": any(record.image for record in good),
            "captions": any(record.captions for record in good),
            "depth": any(record.depth for record in good),
        }
        return frozenset(name for name, is_there in present.items() if is_there)

    @property
    def problems(self) -> dict[str, str]:
        """The bad records: id -> reason."""
        return {record.id: record.problem for record in self.records if record.problem}

    def limited(self, limit: int, seed: int) -> "ListedRecords":
        """`limit` records in their order, spread over all."""
        return ListedRecords([self.records[index] for index in choose(self.ids, limit, seed)])

    def requiring(self, fields: Collection[str]) -> "ListedRecords":
        """The same records, in which those without one of `fields` are bad."""
        records = []
        for record in self.records:
            missing = [text for name, text in REQUIRED.items() if name in fields and not getattr(record, name)]
            records.append(replace(record, problem=record.problem or " and ".join(missing)))
        return ListedRecords(records)


def unique(records: Sequence[Record]) -> list[Record]:
    """The records; those whose id occurred before get an id of their own and are bad."""
    counts: dict[str, int] = {}
    result = []
    for record in records:
        counts[record.id] = count = counts.get(record.id, 0) + 1
        if count > 1:
            record = replace(
                record, id=f"{record.id}#{count}", problem=record.problem or f"the id {record.id!r} occurred before"
            )
        result.append(record)
    return result
