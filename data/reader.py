"""What every data format provides: a Reader of Items, which decodes nothing before an item is asked for.

A format is one file: a subclass of `FileReader` whose `listing` turns a folder or file into `Record`s, and one line in
`readers/__init__.py` that registers it.
"""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import existing, inside
from crossflow.data.index.listing import Kept, kept
from crossflow.data.index.store import Messages
from crossflow.data.item import BadItem, Item, Record
from crossflow.data.records import ListedRecords, Records, unique
from crossflow.data.spec import Options, parse_options, split_location

if TYPE_CHECKING:
    from crossflow.core.noise import Order

NUM_DIGESTED = 256  # items whose content enters a fingerprint
EDGE_BYTES = 65536  # read from either end of such a file


class Reader(ABC):
    """The items of one `split` of a data set, in a fixed order.

    >>> from crossflow.data.readers import open_reader
    >>> reader = open_reader("scenes", "val", image_size=32, limit=3)
    >>> len(reader), reader.ids[0], reader[0].image.shape, len(reader.captions(0))
    (3, 'val/000000', (32, 32, 3), 5)
    """

    prefix: ClassVar[str]  # what users write before the colon
    layout: ClassVar[str]  # what a location must look like, for messages: "a folder with ..."
    offers: ClassVar[frozenset[str]]  # the fields that data of this format can have
    batch_hint: int = 1  # number of items for which one call of `load` is efficient
    embedded: ClassVar[bool] = False  # comes with the package, so the prefix takes no location
    options: ClassVar[Options] = {}  # options after the location: `DIR?crop=eigen`

    spec: str
    split: str
    fields: frozenset[str]  # what these data have, a subset of FIELDS
    ids: Sequence[str]  # unique and stable; may contain "/"
    required: frozenset[str] = frozenset()  # fields that every good item must have, see `with_required`

    @abstractmethod
    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        """`location` is what follows the prefix; the other arguments are those of `open_reader`."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Item]:
        """All items in order; raises BadItem at the first bad one, whereas `dataset.check` reads on."""
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Item `index`, decoded. Raises BadItem with the reason when it is unusable."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, where possible without decoding its image."""
        return self[index].captions

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        """Several items at once; bad ones are returned, not raised."""
        return [self._item_or_reason(index) for index in indices]

    def order(self, seed: int, epoch: int) -> "Order":
        """The order in which training reads the items in an epoch."""
        from crossflow.core.noise import order  # imports torch, which listing data should not

        return order(seed, epoch, len(self))

    def _item_or_reason(self, index: int) -> Item | BadItem:
        try:
            return self[index]
        except BadItem as bad:
            return BadItem(bad.id, bad.reason)  # its traceback would keep the decoded data in memory

    @property
    def problems(self) -> dict[str, str]:
        """Items known to be bad before anything is decoded: id -> reason."""
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hex digits of names, sizes, captions and (sampled) content; independent of the files' place and age."""

    def with_required(self, fields: Collection[str]) -> "Reader":
        """The same data, in which an item without one of `fields`, a subset of `self.fields`, is bad."""
        assert self.fields.issuperset(fields)
        reader = copy.copy(self)
        reader.required = frozenset(fields)
        return reader

    @classmethod
    def recognise(cls, path: Path) -> str:
        """What marks the existing `path` as data of this format ("frames.json"), or "" when nothing does."""
        return ""


@dataclass(frozen=True)
class Listing:
    """The records of a split. File names are relative to `root`; files must lie in an `allowed` folder (the root)."""

    root: Path
    records: list[Record] | Records
    allowed: tuple[Path, ...] = ()


class FileReader(Reader):
    """A reader of image files, listed by `listing`.

    Raises UserError for a missing location, an unknown layout, invalid options, and a split without items.
    """

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.split = f"{self.prefix}:{location}", split
        if not location:
            raise UserError(f"{self.spec!r} has no location: write {self.prefix}:PATH with {self.layout}.")
        place, options = split_location(location)
        self.option = parse_options(options, self.options, self.spec)
        path = existing(place)
        if path is None:
            raise UserError(f"{self.spec!r}: {place!r} does not exist. Expected {self.layout}.")
        try:
            listing = self._kept(path, split) if self.is_large(path) else self.listing(path, split)
        except OSError as error:
            raise UserError(f"{self.spec!r} cannot be read: {error}.") from error
        if not len(listing.records):
            raise UserError(f"{self.spec!r} has no items in split {split!r}. Expected {self.layout}.")
        self.root = listing.root
        self.allowed = tuple(folder.resolve() for folder in listing.allowed or (listing.root,))
        records = listing.records
        if not isinstance(records, Records):
            records = ListedRecords(unique(records))
        self._set_records(records if limit is None or limit >= len(records) else records.limited(limit, seed))
        self.fields = self.records.fields

    @abstractmethod
    def listing(self, path: Path, split: str) -> Listing:
        """The records of `split` (`all`: of every split) at the existing `path`.

        Raises UserError for another layout.
        """

    def is_large(self, path: Path) -> bool:
        """Whether the listing is kept in the user's cache, where each process finds it; needs `watched`."""
        return False

    def watched(self, path: Path) -> Iterable[Path]:
        """The files and folders whose size or modification time changes when the listing does."""
        raise NotImplementedError

    def _kept(self, path: Path, split: str) -> Listing:
        def make() -> Kept:
            listing = self.listing(path, split)
            return Kept(listing.root, listing.allowed, unique(list(listing.records)))

        key = (self.prefix, path.resolve(), path, split, json.dumps(self.option, sort_keys=True))
        listing = kept(key, self.spec, make, lambda: self.watched(path))
        records = listing.records
        return Listing(listing.root, records if isinstance(records, Records) else list(records), listing.allowed)

    def _set_records(self, records: Records) -> None:
        self.records, self.ids = records, records.ids

    def __getitem__(self, index: int) -> Item:
        """Item `index`, decoded. Raises BadItem with the reason when it is unusable."""
        record = self.records[index]
        if record.problem:
            raise BadItem(record.id, record.problem)
        try:
            image, depth = self.read(record)
            grey = self._is_grey(record, image)
        except (ValueError, OSError) as error:
            raise BadItem(record.id, str(error)) from error
        if depth is not None and depth.shape != image.shape[:2]:
            raise BadItem(record.id, f"depth is {_size(depth)}, the image {_size(image)} pixels (height x width)")
        return Item(record.id, image, record.captions, depth, grey=grey)

    def read(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """The image uint8 (H, W, 3) and the depth, if any, float32 (H, W) in metres, 0 = no measurement.

        Raises ValueError or OSError with the reason when they are unreadable.
        """
        # Imported here: listing formats and reading captions need no image library.
        from crossflow.data.images import load_depth_png, load_image

        image = load_image(self.path(record.image))
        return image, load_depth_png(self.path(record.depth)) if record.depth else None

    def _is_grey(self, record: Record, image: np.ndarray) -> bool:
        from crossflow.data.images import is_grey

        return is_grey(image, self.path(record.image))

    def path(self, name: str) -> Path:
        """The file `name` of a record. Raises ValueError when it is missing or lies outside the data."""
        return inside(self.root, name, self.allowed)

    def number_option(self, name: str) -> float | None:
        """The value of a numeric option, None for `none`."""
        value = self.option[name]
        return None if value in ("none", "") else float(value)

    def path_option(self, name: str, root: Path) -> Path | None:
        """The path of an option, relative to `root` or else to the current folder; None when the option is not set.

        Raises UserError when it does not exist.
        """
        value = self.option[name]
        if not value:
            return None
        path = existing(str(root / Path(value).expanduser())) or existing(value)
        if path is None:
            raise UserError(f"{self.spec!r}: {name}={value}, but no such file or folder exists.")
        return path

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, known from the listing."""
        return self.records[index].captions

    @property
    def problems(self) -> dict[str, str]:
        """Items that the listing found to be bad: id -> reason."""
        return self.records.problems

    def with_required(self, fields: Collection[str]) -> "FileReader":
        """The same data, in which an item without one of `fields` is bad."""
        assert self.fields.issuperset(fields)
        reader = copy.copy(self)
        reader._set_records(self.records.requiring(fields))
        return reader

    def fingerprint(self) -> str:
        """All names, captions and sizes; of 256 items, spread evenly, also 64 KiB of either end of the files.

        That of indexed data is kept; it is computed again when the index or one of the 256 items has changed.
        """
        options = {
            name: value
            for name, value in self.option.items()
            if value != self.options[name].default and not self.options[name].is_place
        }
        stride = -(-len(self.records) // NUM_DIGESTED)
        samples = [self._record_digest(self.records[number], True) for number in range(0, len(self.records), stride)]
        start = json.dumps(options, sort_keys=True).encode() if options else b""
        now = hashlib.blake2b(b"".join([start, *samples]), digest_size=16).hexdigest()

        def compute() -> str:
            digest = hashlib.blake2b(start, digest_size=16)
            progress = Messages(self.spec, "computing the fingerprint of its files")
            for number, record in enumerate(self.records):
                progress(number, len(self.records))
                in_full = number % stride == 0
                digest.update(samples[number // stride] if in_full else self._record_digest(record, False))
            return digest.hexdigest()

        return self.records.keep(f"fingerprint-{now}", compute)

    def _record_digest(self, record: Record, with_content: bool) -> bytes:
        row = [record.id, record.image, record.captions, record.depth, "bad" if record.problem else ""]
        digests = [
            self._file_digest(name, with_content)
            for name in (record.image, record.depth)
            if name and not record.problem
        ]
        return json.dumps(row).encode() + b"".join(digests)

    def _file_digest(self, name: str, with_content: bool) -> bytes:
        try:
            path = inside(self.root, name, self.allowed)
            size = path.stat().st_size
            if not with_content:
                return str(size).encode()
            with path.open("rb") as file:
                head = file.read(EDGE_BYTES)
                file.seek(max(len(head), size - EDGE_BYTES))
                return b"%d:" % size + hashlib.blake2b(head + file.read()).digest()
        except (ValueError, OSError):
            return b"unreadable"


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
