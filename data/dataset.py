"""Examples of a data set, as training and evaluation use them.

The order of examples is a function of (seed, epoch), augmentation one of (seed, epoch, index): a run that is resumed,
or continued on another number of processes, sees the same examples without any saved state.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.noise import Order, key
from crossflow.core.progress import Progress
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_BYTES = 2**30
HOPELESS = 8  # times the memory for items: data of this size are read again in each epoch
AHEAD = 1024  # places of an order that are computed together
NUM_LISTED = 10  # bad items named in messages


class Examples(Generic[T]):
    """`examples[epoch, index]` = transform(item, generator), for the items of a reader.

    >>> from crossflow.data.readers import open_reader
    >>> reader = open_reader("scenes", "train", image_size=16, limit=4)
    >>> examples = Examples(reader, lambda item, generator: item.image.shape, seed=0)
    >>> len(examples), examples[0, 3]
    (4, (16, 16, 3))

    A bad item is replaced by the next good one, the same one in every process. Decoded items stay in memory while they
    fit, so a small set is decoded once; of a set more than eight times as large none stays. Examples can be pickled and
    used by the workers of a DataLoader, which request a whole batch at a time.

    Args:
        reader: the items, as returned by `require`.
        transform: (item, numpy generator keyed by (seed, epoch, index)) -> example. It must not modify the item's
            arrays, and may raise BadItem for an unusable item.
        seed: of the augmentation.
        cache: keep decoded items in memory.
        cache_bytes: limit of that memory, shared by the workers of a DataLoader.
        max_bad: share of bad items in [0, 1] above which the data are refused.

    Raises:
        UserError: more than `max_bad` of all items, or all of them, are bad; with the first ten reasons. Raised as soon
            as it is known, for undecodable files on access.
    """

    def __init__(
        self,
        reader: Reader,
        transform: Callable[[Item, np.random.Generator], T],
        *,
        seed: int,
        cache: bool = True,
        cache_bytes: int = CACHE_BYTES,
        max_bad: float = 0.05,
    ) -> None:
        self.reader, self.transform, self.seed, self.max_bad = reader, transform, seed, max_bad
        self.cache_bytes = cache_bytes if cache else 0
        self.bad: dict[str, str] = {}  # id -> reason, of the bad items encountered so far
        self._cached: dict[int, Item] = {}
        self._used_bytes = 0
        self._unreadable: dict[int, BadItem] = {}
        for id, reason in reader.problems.items():
            self._note(BadItem(id, reason))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, place: int | tuple[int, int]) -> T:
        """The example at (epoch, index); an index alone means epoch 0."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[T]:
        """Several examples, whose items are loaded in one call, which is faster for readers that render."""
        keys = [place if isinstance(place, tuple) else (0, place) for place in places]
        total = len(self)
        for _, index in keys:
            if not 0 <= index < total:
                raise IndexError(f"index {index} of {total} examples")
        loaded, generators = self._load(keys), _ItemGenerator(self.seed)
        return [self._example(epoch, index, loaded, generators) for epoch, index in keys]

    def order(self, seed: int, epoch: int) -> Order:
        """The order of the indices in an epoch."""
        return self.reader.order(seed, epoch)

    def first(self, count: int) -> list[T]:
        """The examples of epoch 0 at the first `count` indices, loaded together."""
        return self.__getitems__(list(range(min(count, len(self)))))

    def items(self, limit: int | None = None) -> Iterator[Item]:
        """The good items in the reader's order, from at most `limit` of them; bad ones are skipped and counted."""
        start, left = 0, len(self) if limit is None else limit
        while start < len(self) and left > 0:
            stop = min(start + min(left, max(16, self.reader.batch_hint)), len(self))
            for item in self.items_at(range(start, stop)):
                left -= 1
                yield item
            start = stop

    def items_at(self, indices: Sequence[int]) -> Iterator[Item]:
        """The good items at these indices, loaded in one call; bad ones are skipped and counted."""
        missing = [index for index in indices if index not in self._cached and index not in self._unreadable]
        fresh = dict(zip(missing, self.reader.load(missing), strict=True))
        for index in indices:
            item = fresh.get(index) or self._cached.get(index) or self._unreadable[index]
            if isinstance(item, BadItem):
                self._unreadable[index] = item
                self._note(item)
            else:
                self._keep(index, item)
                yield item

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """All captions of the first `limit` items, if possible without decoding images."""
        for index in range(min(len(self), limit or len(self))):
            yield from self.reader.captions(index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": {}, "_used_bytes": 0}

    def _example(self, epoch: int, index: int, loaded: dict[int, Item | BadItem], generators: "_ItemGenerator") -> T:
        total = len(self)
        for distance in range(total):
            candidate = (index + distance) % total
            if candidate not in loaded:
                loaded |= self._load([(epoch, candidate)])
            item = loaded[candidate]
            if isinstance(item, BadItem):
                self._note(item)
                continue
            try:
                return self.transform(item, generators.at(epoch, index))
            except BadItem as bad:
                self._note(bad)
        raise UserError(f"{self.reader.spec!r}: no item is usable.{self._listed()}")

    def _load(self, keys: Sequence[tuple[int, int]]) -> dict[int, Item | BadItem]:
        """The items at these (epoch, index), from memory if possible."""
        indices = list(dict.fromkeys(index for _, index in keys))
        missing = [index for index in indices if index not in self._cached and index not in self._unreadable]
        if missing:
            missing += self._ahead(*keys[-1], missing)
        fresh = dict(zip(missing, self.reader.load(missing), strict=True))
        for index, item in fresh.items():
            if isinstance(item, BadItem):
                self._unreadable[index] = item
            else:
                self._keep(index, item)
        return {index: self._cached.get(index) or self._unreadable.get(index) or fresh[index] for index in indices}

    def _ahead(self, epoch: int, index: int, missing: Sequence[int]) -> list[int]:
        """The next items of the epoch to load with the missing ones, if there is memory left."""
        room = self.reader.batch_hint - len(missing)
        if room <= 0 or self._used_bytes >= self._budget():
            return []
        sequence = self.order(self.seed, epoch)
        known = {*self._cached, *self._unreadable, *missing}
        ahead: list[int] = []
        for start in range(sequence.place_of(index) + 1, len(self), AHEAD):
            places = np.arange(start, min(start + AHEAD, len(self)))
            ahead += [other for other in sequence[places].tolist() if other not in known]
            if len(ahead) >= room:
                break
        return ahead[:room]

    def _keep(self, index: int, item: Item) -> None:
        if index in self._cached:
            return
        size = sum(array.nbytes for array in (item.image, item.depth) if array is not None)
        size += 1000 + 2 * sum(map(len, item.captions))
        # Of data that are far larger, few items would be read from memory; those that are rendered together are kept
        # until they are used.
        if self.reader.batch_hint == 1 and size * len(self) > HOPELESS * self._budget():
            return
        if self._used_bytes + size <= self._budget():
            self._cached[index] = item
            self._used_bytes += size

    def _budget(self) -> int:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        return self.cache_bytes // (worker.num_workers if worker else 1)

    def _note(self, bad: BadItem) -> None:
        if bad.id in self.bad:
            return
        self.bad[bad.id] = bad.reason
        if len(self.bad) <= NUM_LISTED:
            logger.warning("%s: skipping item %s", self.reader.spec, bad)
        if len(self.bad) > self.max_bad * len(self) or len(self.bad) == len(self):
            raise UserError(
                f"{self.reader.spec!r} (split {self.reader.split!r}): {len(self.bad)} of {len(self)} items are bad so "
                f"far; the limit is {self.max_bad:.0%} (data.max_bad). Repair or remove them, or raise the limit."
                f"{self._listed()}"
            )

    def _listed(self) -> str:
        lines = [f"\n  {id}: {reason}" for id, reason in list(self.bad.items())[:NUM_LISTED]]
        more = len(self.bad) - len(lines)
        return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")


class _ItemGenerator:
    """The generator of each example, keyed by (seed, epoch, index).

    One generator is reset for each example, because creating one takes longer than reading from a feature cache.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.bits = np.random.Philox(key=0)
        self.start = self.bits.state
        self.generator = np.random.Generator(self.bits)

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """The generator of (epoch, index), valid until the next call."""
        self.start["state"]["key"][0] = key("augment", self.seed, epoch, index)
        self.bits.state = self.start
        return self.generator


@dataclass(frozen=True)
class Check:
    """The result of reading all items: the number of good ones, and the reasons of the bad ones."""

    total: int
    good: int
    num_captions: int
    bad: dict[str, str] = field(default_factory=dict)  # id -> reason


def check(
    reader: Reader,
    progress: Progress | None = None,
    on_item: Callable[[Item], None] | None = None,
) -> Check:
    """Reads every item. Calls `progress(done, total)` after each batch and `on_item` with each good item."""
    bad: dict[str, str] = {}
    num_captions = 0
    stride = max(16, reader.batch_hint)
    for start in range(0, len(reader), stride):
        indices = range(start, min(start + stride, len(reader)))
        for item in reader.load(indices):
            if isinstance(item, BadItem):
                bad[item.id] = item.reason
            else:
                num_captions += len(item.captions)
                if on_item is not None:
                    on_item(item)
        if progress is not None:
            progress(indices.stop, len(reader))
    return Check(len(reader), len(reader) - len(bad), num_captions, bad)
