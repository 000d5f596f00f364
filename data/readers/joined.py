"""Several data sets as one: `hypersim:DIR + vkitti:DIR`, as zero-shot depth is trained.

`20 * folder:DIR + scenes` reads the first twenty times in each epoch.
"""

import copy
import functools
import hashlib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.records import LazyIds
from crossflow.data.splits import choose

SEPARATOR = " + "


class JoinedReader(Reader):
    """The items of `readers`, one data set after the other; ids begin with the format and number of their data set.

    It has the fields that all of them have. limit: maximum number of items, spread over all; seed: decides which.
    """

    def __init__(self, readers: Sequence[Reader], limit: int | None = None, seed: int = 0) -> None:
        self.readers = list(readers)
        runs = [(spec, len(list(same))) for spec, same in groupby(reader.spec for reader in readers)]
        self.spec = SEPARATOR.join(f"{times} * {spec}" if times > 1 else spec for spec, times in runs)
        self.split = readers[0].split if len({reader.split for reader in readers}) == 1 else "all"
        self.fields = frozenset.intersection(*(reader.fields for reader in readers))
        self.batch_hint = max(reader.batch_hint for reader in readers)
        self._starts = [0, *accumulate(len(reader) for reader in readers)]
        self._places: Sequence[int] = range(self._starts[-1])
        self.ids = _Ids(self)
        if limit is not None and limit < len(self.ids):
            self._places = choose(self.ids, limit, seed)

    def _name(self, number: int, id: str) -> str:
        return f"{self.readers[number].spec.partition(':')[0]}-{number + 1}/{id}"

    def _locate(self, index: int) -> tuple[int, int]:
        """(number of the data set, index inside it) of item `index`."""
        place = self._places[index]
        number = bisect_right(self._starts, place) - 1
        return number, place - self._starts[number]

    def __getitem__(self, index: int) -> Item:
        item = self.load([index])[0]
        if isinstance(item, BadItem):
            raise item
        return item

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        """Each data set loads its items in one call."""
        places = [self._locate(index) for index in indices]
        items: list[Item | BadItem | None] = [None] * len(places)
        for number, reader in enumerate(self.readers):
            slots = [slot for slot, (owner, _) in enumerate(places) if owner == number]
            for slot, item in zip(slots, reader.load([places[slot][1] for slot in slots]), strict=True):
                name = self._name(number, item.id)
                items[slot] = BadItem(name, item.reason) if isinstance(item, BadItem) else replace(item, id=name)
        return [item for item in items if item is not None]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, as its own reader gives them."""
        number, inner = self._locate(index)
        return self.readers[number].captions(inner)

    @functools.cached_property
    def problems(self) -> dict[str, str]:
        """The known bad items of all data sets."""
        return {
            self._name(number, id): reason
            for number, reader in enumerate(self.readers)
            for id, reason in reader.problems.items()
        }

    def with_required(self, fields: Collection[str]) -> "JoinedReader":
        """The same data, in which an item without one of `fields` is bad."""
        reader = copy.copy(self)
        demanding = {id(part): part.with_required(fields) for part in self.readers}
        reader.readers = [demanding[id(part)] for part in self.readers]
        reader.required = frozenset(fields)
        reader.__dict__.pop("problems", None)
        return reader

    def fingerprint(self) -> str:
        """Of the fingerprints of all data sets, in their order, and of the items that a limit leaves."""
        own = {id(reader): reader.fingerprint() for reader in self.readers}
        digest = hashlib.blake2b("\n".join(own[id(reader)] for reader in self.readers).encode(), digest_size=16)
        if len(self.ids) < self._starts[-1]:
            digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()


class _Ids(LazyIds):
    """The ids of all data sets, with the names of their data sets."""

    def __init__(self, reader: JoinedReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader._places)

    def id_at(self, index: int) -> str:
        """FORMAT-NUMBER/ID."""
        number, inner = self.reader._locate(index)
        return self.reader._name(number, self.reader.readers[number].ids[inner])
