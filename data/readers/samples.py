"""The samples of all shards of a data set: one row each, in an array that every process maps into memory."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from crossflow.core.files import replacing
from crossflow.data.index.store import Messages, Store, building, folder_of
from crossflow.data.readers.shards import RemoteShards, Shards
from crossflow.data.readers.tar_index import PARTS, shard_index
from crossflow.data.splits import SPLIT_WORDS, hashed_split, rank, split_word

if TYPE_CHECKING:
    from crossflow.core.noise import KeyedOrder

logger = logging.getLogger(__name__)

VERSION = "wds 1"  # of the files; changes with their content
LARGEST_IN_MEMORY = 2**30  # bytes of all shards
PICTURE, TEXT, JSON = 1, 2, 4  # flags of a sample: the parts that it has
AHEAD = 4  # shards that are downloaded while others are indexed
CHUNK = 2**16  # rows that are read together
Places = Sequence[int] | np.ndarray


class Samples:
    """The samples of `shards`, in their order. `spec` is that of the data, for messages.

    The shards' own indices are joined once, in the user's cache, if the shards are large; the rows of each split are
    kept beside. The lost end of a damaged shard is a row without a key.

    Attributes:
        rows: structured (samples,): key, offset and size of each part, shard.
        flags: uint8 (samples,): PICTURE, TEXT and JSON of the parts that a sample has.
        starts: int64 (shards + 1,): the first row of each shard.
        damaged: number of a shard -> why its end is lost.
        by_folder: the splits are folders that hold the shards.
        num_items: of each split, without the lost ends.
    """

    def __init__(self, shards: Shards, spec: str) -> None:
        self.shards, self.spec = shards, spec
        versions = [shards.version(number) for number in range(len(shards))]
        total = sum(shards.size(number) for number in range(len(shards)))
        small = not isinstance(shards, RemoteShards) and total <= LARGEST_IN_MEMORY
        self.store = Store(None if small else folder_of(VERSION, *versions))
        if self.store.folder is None:
            self._build()
        elif not self._is_complete():
            with building(self.store.folder, spec):
                if not self._is_complete():
                    self._build()
        self._open()

    def _open(self) -> None:
        self.rows, self.flags, self.starts = (self.array(name) for name in ("rows", "flags", "starts"))
        about = json.loads(self.store.text("about") or "{}")
        self.damaged = {int(number): reason for number, reason in about["damaged"].items()}
        self.by_folder: bool = about["by_folder"]
        self.num_items: dict[str, int] = about["num_items"]

    def array(self, name: str) -> np.ndarray:
        """A stored array, such as the rows of a split, int64, ascending."""
        array = self.store.array(name)
        assert array is not None, name
        return array

    def _is_complete(self) -> bool:
        names = ("rows", "flags", "starts", *SPLIT_WORDS)
        return self.store.text("about") is not None and all(self.store.array(name) is not None for name in names)

    def __getstate__(self) -> dict[str, Any]:
        mapped = dict.fromkeys(("rows", "flags", "starts")) if self.store.folder is not None else {}
        return self.__dict__ | mapped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    # -- reading

    def id(self, row: int) -> str:
        """SHARD/KEY, or SHARD/(truncated) for the lost end of a shard."""
        return self._name(int(self.rows["shard"][row]), self.rows["key"][row])

    def _name(self, shard: int, key: bytes) -> str:
        return f"{self.shards.names[shard]}/{key.decode('utf-8', 'replace') or '(truncated)'}"

    def problem(self, row: int) -> str:
        """Why a sample has no picture."""
        return "has no picture" if self.rows["key"][row] else self.damaged[int(self.rows["shard"][row])]

    def chunks(self, places: Places) -> Iterator[np.ndarray]:
        """The rows at these places, some at a time."""
        for start in range(0, len(places), CHUNK):
            chosen = places[start : start + CHUNK]
            yield self.rows[chosen.start : chosen.stop] if isinstance(chosen, range) else self.rows[chosen]

    # -- building

    def _build(self) -> None:
        sizes, damaged = [], {}
        progress = Messages(self.spec, "indexing its shards (only once)")
        for number in range(len(self.shards)):
            self.shards.ahead(range(number, min(number + AHEAD, len(self.shards))))
            index, damage = self._index(number)
            if damage:
                damaged[number] = damage
                logger.warning("%s: %s", self.shards.names[number], damage)
            sizes.append((len(index), index.dtype["key"].itemsize))
            progress(number + 1, len(self.shards))
        starts = np.cumsum([0, *(count for count, _ in sizes)])
        self._join(starts, max(width for _, width in sizes))
        self.rows = self.array("rows")
        self.store.put("starts", starts)
        self.store.put("flags", self._flags())
        words = [
            next(filter(None, map(split_word, reversed(PurePosixPath(n).parts[:-1]))), "") for n in self.shards.names
        ]
        splits = _by_folder(words, starts) if any(words) else self._hashed()
        for word, members in splits.items():
            self.store.put(word, members)
        num_items = {word: int(np.count_nonzero(self.rows["key"][members] != b"")) for word, members in splits.items()}
        about = {"damaged": damaged, "by_folder": any(words), "num_items": num_items}
        self.store.put("about", json.dumps(about))  # the last one: it makes the index complete

    def _index(self, number: int) -> tuple[np.ndarray, str]:
        """The rows of a shard, and why its end is lost; see `shard_index`."""
        version = f"{VERSION} {self.shards.version(number)} {self.shards.content_digest(number).hex()}"
        return shard_index(lambda: self.shards.open(number), version)

    def _join(self, starts: np.ndarray, width: int) -> None:
        """Writes the rows of all shards, without holding them in memory if there is a folder."""
        fields = [field for part in PARTS for field in ((part, "<u8"), (f"{part}_size", "<u8"))]
        dtype = np.dtype([("key", f"S{width}"), *fields, ("shard", "<u4")])
        num_rows = int(starts[-1])
        if self.store.folder is None:
            self.store.put("rows", self._filled(np.empty(num_rows, dtype), starts))
            return
        with replacing(self.store.folder / "rows.npy") as temporary:
            mapped = np.lib.format.open_memmap(temporary, "w+", dtype, (num_rows,))
            self._filled(mapped, starts)
            mapped.flush()

    def _filled(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        for number in range(len(self.shards)):
            index, part = self._index(number)[0], rows[starts[number] : starts[number + 1]]
            for name in index.dtype.names or ():
                part[name] = index[name]
            part["shard"] = number
        return rows

    def _flags(self) -> np.ndarray:
        """uint8 (samples,): PICTURE, TEXT and JSON of the parts that a sample has."""
        parts = zip((PICTURE, TEXT, JSON), PARTS, strict=True)
        chunks = [np.zeros(0, np.uint8)]
        marks = [(flag, f"{part}_size") for flag, part in parts]
        for rows in self.chunks(range(len(self.rows))):
            chunks.append(
                sum(((rows[name] > 0) * np.uint8(flag) for flag, name in marks), np.zeros(len(rows), np.uint8))
            )
        return np.concatenate(chunks)

    def _hashed(self) -> dict[str, np.ndarray]:
        """The rows of each split by a hash of the names. The lost ends of shards are in every split."""
        names = (
            self._name(shard, key)
            for rows in self.chunks(range(len(self.rows)))
            for shard, key in zip(rows["shard"].tolist(), rows["key"].tolist(), strict=True)
        )
        splits = hashed_split(np.fromiter(map(rank, names), np.uint64, len(self.rows)), self.id)
        lost = self.rows["key"] == b""
        return {word: np.flatnonzero((splits == number) | lost) for number, word in enumerate(SPLIT_WORDS)}


def _by_folder(words: Sequence[str], starts: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, where `words` are the splits of the shards."""
    empty = np.zeros(0, np.int64)
    return {
        split: np.concatenate(
            [empty, *(np.arange(starts[n], starts[n + 1]) for n, word in enumerate(words) if word == split)]
        )
        for split in SPLIT_WORDS
    }


class ShardOrder:
    """An order of samples in which few shards are in use at a time: those of an epoch are shuffled, then divided into
    groups of `width`, and the samples of a group are shuffled.

    Args:
        bounds: int64 (shards + 1,): the first item of each shard, and the number of items.
        seed, epoch: of the order.
        width: number of shards in a group.
    """

    def __init__(self, bounds: np.ndarray, seed: int, epoch: int, width: int) -> None:
        from crossflow.core.noise import KeyedOrder  # imports torch, which listing data should not

        self.seed, self.epoch, self.width = seed, epoch, width
        sizes = np.diff(bounds)
        self.shards = KeyedOrder(len(sizes), "shards", seed, epoch)[np.arange(len(sizes))]
        self.firsts = bounds[:-1][self.shards]  # the first item of each shard, in this order
        self.ends = np.cumsum(sizes[self.shards])  # the place after each shard, if samples were not shuffled
        self.groups = np.concatenate([[0], self.ends[width - 1 :: width], self.ends[-1:]])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        groups = np.searchsorted(self.groups, places, side="right") - 1
        shuffled = np.empty_like(places)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            shuffled[chosen] = self.groups[group] + self._inside(group)[places[chosen] - self.groups[group]]
        positions = np.searchsorted(self.ends, shuffled, side="right")
        return self.firsts[positions] + shuffled - np.concatenate([[0], self.ends])[positions]

    def _inside(self, group: int) -> "KeyedOrder":
        """The order of the samples of a group."""
        from crossflow.core.noise import KeyedOrder

        return KeyedOrder(int(self.groups[group + 1] - self.groups[group]), "samples", self.seed, self.epoch, group)

    def place_of(self, index: int) -> int:
        """The place at which `index` stands."""
        position = int(np.flatnonzero((self.firsts <= index) & (index < self.firsts + self._sizes()))[0])
        place = int(self.ends[position] - self._sizes()[position] + index - self.firsts[position])
        group = int(np.searchsorted(self.groups, place, side="right")) - 1
        return int(self.groups[group]) + self._inside(group).place_of(place - int(self.groups[group]))

    def _sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def near(self, shard: int) -> list[int]:
        """The shards of the group of `shard`, and of the next one."""
        start = int(np.flatnonzero(self.shards == shard)[0]) // self.width * self.width
        return self.shards[start : start + 2 * self.width].tolist()
