"""`cache:DIR`: features computed by `crossflow cache`. Items have captions and features instead of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossflow.core.errors import UserError
from crossflow.data.files import existing
from crossflow.data.item import Item
from crossflow.data.reader import Reader
from crossflow.data.records import LazyIds
from crossflow.data.splits import choose

if TYPE_CHECKING:
    from crossflow.data.cache.store import Cache, Rows


class CacheReader(Reader):
    """The good items of a split of a cache, in the order of the data that it was computed from."""

    prefix = "cache"
    layout = "a folder written by `crossflow cache`"
    offers = frozenset(("captions", "features"))

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        from crossflow.data.cache.store import Cache  # imports torch, which listing the formats should not

        self.spec, self.split, self.fields = f"{self.prefix}:{location}", split, self.offers
        path = existing(location) if location else None
        if path is None:
            raise UserError(f"{self.spec!r}: {location!r} does not exist. Expected {self.layout}.")
        self.cache: Cache = Cache(path)
        self.rows: Rows = self.cache.rows(split)
        ids = _Ids(self.cache, self.rows)
        self.places: Sequence[int] = range(len(self.rows))
        if limit is not None and limit < len(ids):
            self.places = choose(ids, limit, seed)
        self.ids = _Ids(self.cache, self.rows, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        entry = self.rows[self.places[index]]
        return Item(self.cache.id(entry), captions=self.cache.captions(entry), features=entry)

    def fingerprint(self) -> str:
        """From the features and all shards, independent of the folder and of a limit."""
        return self.cache.fingerprint()

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The manifest `cache.json`."""
        return "cache.json" if path.is_dir() and (path / "cache.json").is_file() else ""


class _Ids(LazyIds):
    """The ids of a cache's items, read from the shards on access."""

    def __init__(self, cache: "Cache", rows: "Rows", places: Sequence[int] | None = None) -> None:
        self.cache, self.rows = cache, rows
        self.places = places if places is not None else range(len(rows))

    def __len__(self) -> int:
        return len(self.places)

    def id_at(self, index: int) -> str:
        """The id of item `index`."""
        return self.cache.id(self.rows[self.places[index]])
