"""What every data format gives: a Reader of Items, loaded when asked for.

A format is one file: a subclass of `FileReader` whose `listing` turns a folder or file into `Record`s, and one line in
`readers/__init__.py` that registers it.
"""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, overload

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import existing, inside
from crossflow.data.item import BadItem, Item, Record
from crossflow.data.spec import Options, parse_options, split_location
from crossflow.data.splits import chosen


class Reader(ABC):
    """The items of one `split` of a data set, in a fixed order. Nothing is decoded before `reader[index]`."""

    prefix: ClassVar[str]  # what users write before the colon
    layout: ClassVar[str]  # what a location must look like, for messages: "a folder with ..."
    offers: ClassVar[frozenset[str]]  # the fields that data of this format can have
    together: ClassVar[int] = 1  # how many items it pays to `load` in one call
    embedded: ClassVar[bool] = False  # comes with the package, so that nothing stands behind the prefix
    options: ClassVar[Options] = {}  # settings that may stand behind the place: `DIR?crop=eigen`

    spec: str
    split: str
    fields: frozenset[str]  # what these data have, a subset of FIELDS
    ids: Sequence[str]  # unique and stable; may contain "/"
    needs: frozenset[str] = frozenset()  # the fields that every good item must have, see `having`

    @abstractmethod
    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        """`location` is what the user wrote behind the prefix; the others are as in `open_reader`."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Item]:
        """All items in order; raises BadItem at the first bad one. `dataset.check` goes on after bad ones."""
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Item `index`, decoded. Raises BadItem with the reason when it cannot be used."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, without its image where that can be had."""
        return self[index].captions

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        """Several items at once; a bad one is returned, not raised."""
        return [self._item_or_reason(index) for index in indices]

    def _item_or_reason(self, index: int) -> Item | BadItem:
        try:
            return self[index]
        except BadItem as bad:
            return BadItem(bad.id, bad.reason)  # without its traceback, which would keep what it was decoding in memory

    @property
    def problems(self) -> dict[str, str]:
        """Items already known to be bad without decoding them: id -> reason."""
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hex digits from names, sizes, captions and (sampled) content, not from the files' place or age."""

    def having(self, fields: Collection[str]) -> "Reader":
        """These data for a task that needs all of `fields`, which are among `self.fields`."""
        assert self.fields.issuperset(fields)
        reader = copy.copy(self)
        reader.needs = frozenset(fields)
        return reader

    @classmethod
    def recognise(cls, path: Path) -> str:
        """What makes the existing `path` look like this format ("frames.json"), or "" when nothing does."""
        return ""


class LazyIds(Sequence[str]):
    """The ids of items, each made when it is asked for: large data have millions. A subclass gives length and `one`."""

    @abstractmethod
    def one(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.one(place) for place in range(*index.indices(len(self)))]
        return self.one(index)

    def __iter__(self) -> Iterator[str]:
        return (self.one(index) for index in range(len(self)))


@dataclass(frozen=True)
class Listing:
    """The records of a split. Files are named relative to `root` and lie in an `allowed` folder (default: the root)."""

    root: Path
    records: list[Record]
    allowed: tuple[Path, ...] = ()


class FileReader(Reader):
    """A reader of image files, listed by `listing`."""

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.split = f"{self.prefix}:{location}", split
        if not location:
            raise UserError(f"{self.spec!r} names no place: write {self.prefix}:PATH with {self.layout}.")
        place, settings = split_location(location)
        self.option = parse_options(settings, self.options, self.spec)
        path = existing(place)
        if path is None:
            raise UserError(f"{self.spec!r}: there is no {place!r}. Expected {self.layout}.")
        try:
            listing = self.listing(path, split)
        except OSError as error:
            raise UserError(f"{self.spec!r} cannot be read: {error}.") from error
        if not listing.records:
            raise UserError(f"{self.spec!r} has no items in its split {split!r}. Expected {self.layout}.")
        self.root = listing.root
        self.allowed = tuple(folder.resolve() for folder in listing.allowed or (listing.root,))
        self._set_records(_chosen(_unique(listing.records), limit, seed))
        good = [record for record in self.records if not record.problem]
        present = {
            "image": any(record.image for record in good),
            "captions": any(record.captions for record in good),
            "depth": any(record.depth for record in good),
        }
        self.fields = frozenset(name for name, is_there in present.items() if is_there)

    @abstractmethod
    def listing(self, path: Path, split: str) -> Listing:
        """The records of `split` ("all": every one) at the existing `path`; UserError when the layout is another."""

    def _set_records(self, records: list[Record]) -> None:
        self.records = records
        self.ids = [record.id for record in records]

    def __getitem__(self, index: int) -> Item:
        record = self.records[index]
        if record.problem:
            raise BadItem(record.id, record.problem)
        try:
            image, depth = self.read(record)
        except UserError:  # what is wrong with all of them, such as a library that is not installed
            raise
        except (ValueError, OSError) as error:
            raise BadItem(record.id, str(error)) from error
        if depth is not None and depth.shape != image.shape[:2]:
            raise BadItem(record.id, f"depth is {_size(depth)}, the image {_size(image)} pixels (height x width)")
        return Item(record.id, image, record.captions, depth)

    def read(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture uint8 (H, W, 3) and, if there is one, the depth float32 (H, W) metres, 0 = no measurement.

        Raises ValueError or OSError with the reason when they cannot be had.
        """
        # Imported here: listing formats and reading captions need no image library.
        from crossflow.data.images import load_depth_png, load_image

        image = load_image(self.path(record.image))
        return image, load_depth_png(self.path(record.depth)) if record.depth else None

    def path(self, name: str) -> Path:
        """The file that a record names; raises ValueError when there is none, or when it lies outside the data."""
        return inside(self.root, name, self.allowed)

    def number(self, option: str) -> float | None:
        """The value of a setting that is a number; None: `none`."""
        value = self.option[option]
        return None if value in ("none", "") else float(value)

    def place(self, option: str, root: Path) -> Path | None:
        """The file or folder that a setting names, relative to `root` or to where we are; None when it is not given.

        Raises UserError when there is nothing.
        """
        given = self.option[option]
        if not given:
            return None
        found = existing(str(root / Path(given).expanduser())) or existing(given)
        if found is None:
            raise UserError(f"{self.spec!r}: {option} names {given!r}, but there is no such file or folder.")
        return found

    def captions(self, index: int) -> tuple[str, ...]:
        return self.records[index].captions

    @property
    def problems(self) -> dict[str, str]:
        return {record.id: record.problem for record in self.records if record.problem}

    def having(self, fields: Collection[str]) -> "FileReader":
        """Items that lack one of `fields` become bad items."""
        assert self.fields.issuperset(fields)
        lacking = {"captions": "has no caption", "depth": "has no depth"}
        reader = copy.copy(self)
        records = []
        for record in self.records:
            missing = [why for name, why in lacking.items() if name in fields and not getattr(record, name)]
            records.append(replace(record, problem=record.problem or " and ".join(missing)))
        reader._set_records(records)
        return reader

    def fingerprint(self) -> str:
        """All names, captions and sizes; of up to 256 items, spread evenly, also 64 KiB of either end of the files."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {
            name: value
            for name, value in self.option.items()
            if value != self.options[name].default and not self.options[name].is_place
        }
        if settings:
            digest.update(json.dumps(settings, sort_keys=True).encode())
        stride = -(-len(self.records) // 256)
        for number, record in enumerate(self.records):
            row = [record.id, record.image, record.captions, record.depth, record.problem]
            digest.update(json.dumps(row).encode())
            for name in (record.image, record.depth):
                if name and not record.problem:
                    digest.update(self._file_digest(name, with_content=number % stride == 0))
        return digest.hexdigest()

    def _file_digest(self, name: str, with_content: bool) -> bytes:
        try:
            path = inside(self.root, name, self.allowed)
            size = path.stat().st_size
            if not with_content:
                return str(size).encode()
            with path.open("rb") as file:
                head = file.read(65536)
                file.seek(max(len(head), size - 65536))
                return b"%d:" % size + hashlib.blake2b(head + file.read()).digest()
        except (ValueError, OSError):
            return b"unreadable"


def _unique(records: list[Record]) -> list[Record]:
    """Later records with an id that occurred before get an id of their own and are bad."""
    seen: dict[str, int] = {}
    result = []
    for record in records:
        seen[record.id] = count = seen.get(record.id, 0) + 1
        if count > 1:
            record = replace(
                record, id=f"{record.id}#{count}", problem=record.problem or f"the id {record.id!r} occurred before"
            )
        result.append(record)
    return result


def _chosen(records: list[Record], limit: int | None, seed: int) -> list[Record]:
    """`limit` records in their order, spread over all."""
    if limit is None or limit >= len(records):
        return records
    return [records[index] for index in chosen([record.id for record in records], limit, seed)]


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
