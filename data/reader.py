"""What every data format gives: a Reader of Items, loaded when asked for.

A format is one file: a subclass of `FileReader` whose `listing` turns a folder or file into `Record`s, and one line in
`__init__.py` that registers it.
Sizes: H height, W width of an image in pixels.
"""

import copy
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.readers.options import Options, parse_options

if TYPE_CHECKING:
    from crossflow.data.scenes import Scene

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "all")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
FIELDS = ("image", "captions", "depth", "scene", "features", "released")


@dataclass(frozen=True, eq=False)
class Item:
    """One example; what a format lacks is empty.

    `image` uint8 (H, W, 3) RGB; `depth` float32 (H, W) metres, 0 = no measurement.
    """

    id: str
    image: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    depth: np.ndarray | None = None
    scene: "Scene | None" = None
    features: Any = None
    """What was computed from the item before: where it lies in a cache, or the arrays of a released feature file."""


class BadItem(Exception):
    """Item `id` cannot be used, for `reason`."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


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


@dataclass(frozen=True, slots=True)
class Record:
    """One item before it is read, its files named relative to the reader's root. `problem`: why it is bad, if known."""

    id: str
    image: str = ""
    captions: tuple[str, ...] = ()
    depth: str = ""
    problem: str = ""


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


def existing(location: str) -> Path | None:
    """The path, with ~ expanded, if there is something."""
    try:
        path = Path(location).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, the home of an unknown user, a NUL
        return None


def split_location(location: str) -> tuple[str, str]:
    """(place, settings) of `PLACE?SETTINGS`; a path that exists with its question mark is a place."""
    if existing(location) is not None:
        return location, ""
    place, _, settings = location.partition("?")
    return place, settings


def refuse_split(spec: str, split: str, there: Collection[str], why: str = "") -> None:
    """Raises UserError unless data with the splits `there` have the one that is asked for."""
    if split == "all" or split in there:
        return
    names = [name for name in SPLITS if name in there]
    has = f"has {', '.join(names)} but" if names else "has"
    take = f" Write '{spec}@{names[-1]}' to use that split instead." if names else ""
    raise UserError(f"{spec!r} {has} nothing for {split!r}{f' ({why})' if why else ''}.{take}")


def with_links(path: Path) -> tuple[Path, ...]:
    """`path` and the folders in it, each of which may be a link to where its files are kept."""
    return (path, *(child for child in sorted(path.iterdir()) if child.is_dir()))


def inside(root: Path, name: str, allowed: Collection[Path]) -> Path:
    """The file `name` under `root`. Raises ValueError with the reason when it is none or leaves the `allowed` folders.

    Names come from files that others wrote, so neither `..` nor an absolute path nor a link may lead to the rest of the
    disk. `allowed` are resolved paths.
    """
    if not name or "\0" in name:
        raise ValueError(f"{name!r} names no file")
    if leaves(name):
        raise ValueError(f"path {name!r} leaves the data folder; only paths below it are read")
    path = root / name
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"path {name!r} cannot be followed: {error}") from error
    if not any(resolved.is_relative_to(folder) for folder in allowed):
        raise ValueError(f"{name!r} is a link that leaves the data folder; only files inside it are read")
    if not path.exists():
        raise ValueError(f"no such file: {name!r} in {str(root)!r}")
    if not path.is_file():
        raise ValueError(f"{name!r} is not a regular file")
    return path


def leaves(name: str) -> bool:
    """Whether the path `name` leads out of the folder that it is relative to, links aside."""
    pure = PurePosixPath(name)
    return pure.is_absolute() or ".." in pure.parts


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def hashed_split(names: Iterable[str]) -> dict[str, str]:
    """Each name's split: 90 % train, 5 % val, 5 % test by a hash of the name alone, so new images move no old ones.

    From three names on, val and test get at least one each: the names with the highest hashes.
    """
    ranks = {
        name: int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64
        for name in names
    }
    splits = {name: "train" if rank < 0.90 else "val" if rank < 0.95 else "test" for name, rank in ranks.items()}
    if len(splits) >= 3:
        *_, before, last = sorted(ranks, key=lambda name: (ranks[name], name))
        splits[last] = "test"
        if "val" not in splits.values():
            splits[before] = "val"
    return splits


def split_by_hash(spec: str, names: Iterable[str], split: str) -> set[str]:
    """The names in `split` of data that bring no splits of their own; raises UserError when that leaves none."""
    names = list(names)
    if split == "all":
        return set(names)
    splits = hashed_split(names)
    counts = {word: list(splits.values()).count(word) for word in SPLIT_WORDS}
    sentence = ", ".join(f"{count} {word}" for word, count in counts.items())
    if names and not counts[split]:
        raise UserError(
            f"{spec!r} has no splits of its own, and by a hash of the names its {len(names)} items are {sentence}: "
            f"none for {split!r}. Give more items or their splits, or write '{spec}@all' to use all of them."
        )
    if len(names) < 100:
        logger.warning("%s brings no splits of its own; by a hash of the names its items are %s.", spec, sentence)
    return {name for name, where in splits.items() if where == split}


def split_word(name: str) -> str:
    """`train`, `val` or `test` for the usual words for them in any case (`dev`, `Validation`), otherwise ""."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), "")


def split_folders(path: Path) -> dict[str, Path]:
    """The sub-folders of `path` that hold a split each: `train` -> path/training."""
    folders = (child for child in sorted(path.iterdir()) if child.is_dir())
    return {split_word(child.name): child for child in folders if split_word(child.name)}


def clean_captions(values: object) -> tuple[str, ...]:
    """Captions from a string or a list of strings: white space becomes single blanks, empty captions go.

    Raises ValueError for other things.
    """
    texts = [values] if isinstance(values, str) else [] if values is None else values
    if not isinstance(texts, list | tuple):
        raise ValueError(f"caption is {type(values).__name__}, not text")
    captions = []
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"caption is {type(text).__name__}, not text")
        # Half of a surrogate pair, as cut JSON escapes leave it, cannot be encoded or tokenized.
        whole = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        captions.append(" ".join(whole.split()))
    return tuple(caption for caption in captions if caption)


def json_lines(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number from 1, object) for each line that is not blank; for a bad line a text that says why it is bad."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield number, f"line {number} of {path.name} is not JSON: {error}"
                continue
            yield number, value if isinstance(value, dict) else f"line {number} of {path.name} is not a JSON object"


def json_file(path: Path) -> object:
    """The content of a JSON file; raises UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {error}.") from error


def image_files(folder: Path) -> list[str]:
    """Images below `folder`, without hidden ones, as sorted names relative to it. Links to folders are not followed."""
    names = []
    for parent, folders, files in os.walk(folder):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        if linked:
            logger.warning("%s: the linked folders %s are not followed.", parent, ", ".join(sorted(linked)))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        relative = Path(parent).relative_to(folder)
        names += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(names)


def fullest_folder(candidates: Sequence[Path], names: Sequence[str]) -> Path:
    """The candidate that holds most of the first names (the first candidate on a tie): where a list's images lie."""
    usual = [name for name in names if name and "\0" not in name and not leaves(name)][:20]
    present = [folder for folder in candidates if folder.is_dir()] or list(candidates[:1])
    return max(present, key=lambda folder: sum(os.path.isfile(folder / name) for name in usual))


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


def chosen(ids: Sequence[str], limit: int, seed: int) -> list[int]:
    """The indices of `limit` ids in their order, picked by a hash of (seed, id), so that a few frames are not all of
    one scene.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}\x1f{ids[index]}".encode("utf-8", "replace"), digest_size=8).digest()

    return sorted(sorted(range(len(ids)), key=rank)[:limit])
