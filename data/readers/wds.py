"""`wds:DIR`: shards of LAION's kind (webdataset, img2dataset): tar files with KEY.jpg, KEY.txt and KEY.json per sample.

The headers of each local shard are read once and kept as an index of offsets; then one seek reads any sample.
So shards are read like any other data: shuffled across all shards by (seed, epoch); divided among processes and workers
without repeating or dropping a sample; and resumed exactly, without the state of a stream. The index takes about 60
bytes of memory per sample.
"""

import hashlib
import json
import logging
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.files import user_cache
from crossflow.data.annotations import clean_captions
from crossflow.data.files import IMAGE_SUFFIXES, existing, save_array
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.readers.jsonl import CAPTION_KEYS
from crossflow.data.records import LazyIds
from crossflow.data.spec import Option, Options, parse_options, split_location
from crossflow.data.splits import choose, split_by_hash, split_word

logger = logging.getLogger(__name__)

VERSION = "1"  # of the index; changes with its content
PARTS = ("image", "text", "json")
EDGE = 65536  # bytes at either end of a shard that identify it
LARGEST = 2**28  # bytes of one sample's file


class WdsReader(Reader):
    """Pictures with captions in local tar shards.

    Splits are the folders train/, val/ and test/ that hold the shards, or else a hash of the samples' names. Samples
    without a picture are bad items, and so is the missing end of a truncated shard.
    """

    prefix = "wds"
    layout = (
        "tar shards on this machine: a folder of them, 'DIR/*.tar' or 'DIR/{00000..00099}.tar', "
        "with KEY.jpg, KEY.txt and KEY.json"
    )
    offers = frozenset(("image", "captions"))
    options: ClassVar[Options] = {"caption": Option("field of KEY.json with the caption, instead of KEY.txt")}

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.split = f"{self.prefix}:{location}", split
        place, settings = split_location(location)
        self.caption = parse_options(settings, self.options, self.spec)["caption"]
        self.shards = shard_files(place, self.spec)
        indices, self.damaged = [], {}
        last_message = time.monotonic()
        for number, shard in enumerate(self.shards):
            if time.monotonic() - last_message > 15:
                last_message = time.monotonic()
                logger.warning("%s: indexing shard %d of %d (only once).", self.spec, number + 1, len(self.shards))
            index, damage = shard_index(shard)
            if damage:
                self.damaged[number] = damage
                logger.warning("%s: %s", shard, damage)
            indices.append(index)
        rows = np.concatenate([_numbered(index, number) for number, index in enumerate(indices)])
        root = _common_root(self.shards)
        self.names = [shard.relative_to(root).with_suffix("").as_posix() for shard in self.shards]
        self.rows = rows[self._members(rows)]
        if not len(self.rows):
            raise UserError(f"{self.spec!r} has no samples in split {split!r}. Expected {self.layout}.")
        self.ids = _Ids(self.names, self.rows)
        if limit is not None and limit < len(self.rows):
            self.rows = self.rows[choose(self.ids, limit, seed)]
            self.ids = _Ids(self.names, self.rows)
        with_text = bool((self.rows["json_size" if self.caption else "text_size"] > 0).any())
        with_text = with_text or bool((self.rows["json_size"] > 0).any())
        self.fields = frozenset(("image", "captions") if with_text else ("image",))

    def _members(self, rows: np.ndarray) -> np.ndarray:
        """Which rows are in the split, bool (rows,). The lost samples of a truncated shard are in every split."""
        if self.split == "all":
            return np.ones(len(rows), dtype=bool)
        words = [next(filter(None, map(split_word, reversed(Path(name).parts[:-1]))), "") for name in self.names]
        if any(words):
            matches = np.array([word == self.split for word in words])
            if not matches.any():
                raise UserError(
                    f"{self.spec!r} has shards for {', '.join(sorted(set(words) - {''}))} but none for {self.split!r}."
                )
            return matches[rows["shard"]]
        ids = _Ids(self.names, rows)
        members = split_by_hash(self.spec, ids, self.split)
        return np.fromiter((id in members for id in ids), dtype=bool, count=len(rows)) | (rows["key"] == b"")

    def __getitem__(self, index: int) -> Item:
        from crossflow.data.images import is_grey, load_image

        row, id = self.rows[index], self.ids[index]
        try:
            metadata = self._json(row)
            status = metadata.get("status")
            if isinstance(status, str) and status != "success":
                raise ValueError(f"it was not downloaded: {metadata.get('error_message') or status}")
            if not row["image_size"]:
                raise ValueError(self._problem(row))
            captions = self._captions(row, metadata)
            if "captions" in self.required and not captions:
                raise ValueError("has no caption")
            content = self._bytes(row, "image")
            image = load_image(content)
            return Item(id, image, captions, grey=is_grey(image, content))
        except (ValueError, OSError) as error:
            raise BadItem(id, str(error)) from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, without its picture; none when they are unreadable."""
        try:
            return self._captions(self.rows[index], self._json(self.rows[index]))
        except (ValueError, OSError):
            return ()

    def _captions(self, row: np.void, metadata: dict) -> tuple[str, ...]:
        if self.caption:
            return clean_captions(metadata.get(self.caption))
        if row["text_size"]:
            return clean_captions(self._bytes(row, "text").decode("utf-8", "replace"))
        return clean_captions(next((metadata[key] for key in CAPTION_KEYS if key in metadata), None))

    def _json(self, row: np.void) -> dict:
        if not row["json_size"]:
            return {}
        try:
            content = json.loads(self._bytes(row, "json"))
        except RecursionError as error:
            raise ValueError("its json is nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError("its json is not an object")
        return content

    def _bytes(self, row: np.void, part: str) -> bytes:
        """One part of a sample. Opening the shard each time leaves no state to share, and is cheap beside decoding."""
        size = int(row[f"{part}_size"])
        if size > LARGEST:
            raise ValueError(f"its {part} has {size:,} bytes, the limit is {LARGEST:,}")
        with self.shards[row["shard"]].open("rb") as file:
            file.seek(int(row[part]))
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the shard is shorter than when it was indexed")
        return content

    def _problem(self, row: np.void) -> str:
        return "has no picture" if row["key"] else self.damaged[int(row["shard"])]

    @property
    def problems(self) -> dict[str, str]:
        """Samples without a picture: id -> reason."""
        return {
            self.ids[index]: self._problem(self.rows[index])
            for index in np.flatnonzero(self.rows["image_size"] == 0).tolist()
        }

    def fingerprint(self) -> str:
        """From the samples' names, offsets and sizes, and the ends of up to 256 shards."""
        digest = hashlib.blake2b(f"{self.caption} {len(self.rows)}".encode(), digest_size=16)
        digest.update(json.dumps(self.names).encode())
        for field in ("key", "shard", *PARTS):
            digest.update(np.ascontiguousarray(self.rows[field]).tobytes())
        for shard in self.shards[:: -(-len(self.shards) // 256)]:
            digest.update(_edges(shard))
        return digest.hexdigest()

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The name of a tar file."""
        if path.is_file():
            return path.name if path.suffix == ".tar" else ""
        return next((file.name for file in sorted(path.glob("*.tar"))), "") if path.is_dir() else ""


class _Ids(LazyIds):
    """SHARD/KEY of each row."""

    def __init__(self, names: Sequence[str], rows: np.ndarray) -> None:
        self.names, self.shards, self.keys = names, rows["shard"], rows["key"]

    def __len__(self) -> int:
        return len(self.keys)

    def id_at(self, index: int) -> str:
        """SHARD/KEY, or SHARD/(truncated) for the lost end of a shard."""
        key = self.keys[index].decode("utf-8", "replace")
        return f"{self.names[self.shards[index]]}/{key or '(truncated)'}"


def shard_files(place: str, spec: str) -> list[Path]:
    """The shards that `place` names, in order. Raises UserError when none exist or when they are not local."""
    if "://" in place or place.startswith("pipe:"):
        raise UserError(
            f"{spec!r} names shards on another machine. Shards are read from local files, in any order, so that runs "
            "can shuffle and resume exactly: download them first and give their folder."
        )
    path = existing(place) if place else None
    if path is not None and path.is_dir():
        files = sorted(path.rglob("*.tar"))
    elif path is not None:
        files = [path]
    else:
        files = sorted(_pattern(place))
    zipped = [file for file in files if file.suffix != ".tar"]
    if zipped:
        raise UserError(
            f"{spec!r}: {zipped[0].name!r} is not a plain .tar file; compressed shards allow no random access."
        )
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        problem = f"{len(missing)} shards do not exist, such as {missing[0]}" if missing else "no .tar files"
        raise UserError(f"{spec!r}: {problem}. Expected {WdsReader.layout}.")
    return [file.absolute() for file in files]


def _pattern(place: str) -> list[Path]:
    """The files that brace patterns (`{00000..00099}`, `{a,b}`) and `*` stand for, missing ones of a range included."""
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(place))
    except ValueError as error:  # unbalanced braces
        raise UserError(f"{place!r} is not a valid brace pattern: {error}.") from error
    files: list[Path] = []
    for name in filter(None, names):
        path = Path(name).expanduser()
        if "*" in name:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files += anchor.glob(str(path.relative_to(path.anchor)) if path.is_absolute() else name)
        else:
            files.append(path)
    return files


def shard_index(shard: Path) -> tuple[np.ndarray, str]:
    """(one row per sample: key, and offset and size of each part; why the rest of the shard is lost, or "").

    The index of an intact shard is kept in the user's cache directory. That of a damaged shard ends with a row without
    a key.
    """
    try:
        status = shard.stat()
        name = hashlib.blake2b(f"{VERSION} {status.st_size} {status.st_mtime_ns}".encode(), digest_size=16)
        name.update(_edges(shard))
    except OSError as error:
        return _rows({}, lost=True), f"the shard cannot be read: {error}"
    index = user_cache() / "tar-index" / f"{name.hexdigest()}.npy"
    try:
        rows = np.load(index, allow_pickle=False)
        if rows.dtype.names == _rows({}).dtype.names:
            return rows, ""
    except (OSError, ValueError, EOFError):
        pass  # missing or damaged: built again
    samples, damage = _scan(shard, status.st_size)
    rows = _rows(samples, lost=bool(damage))
    if not damage:
        save_array(index, rows)
    return rows, damage


def _scan(shard: Path, size: int) -> tuple[dict[str, dict[str, tuple[int, int]]], str]:
    """(key -> part -> (offset, size), in the order of the shard; why it ends early, or "")."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
                part, key = _part(member.name)
                if not part or member.type not in tarfile.REGULAR_TYPES or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    return samples, f"the shard is truncated in {member.name!r}; the samples after it are lost"
                samples.setdefault(key, {}).setdefault(part, (member.offset_data, member.size))
            end = tar.offset  # of the next header
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile accepts half a header as the end
                return samples, f"the shard lacks its end marker, after {len(samples)} samples"
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return samples, f"the shard is damaged after {len(samples)} samples: {error}"
    return samples, ""


def _part(name: str) -> tuple[str, str]:
    """(which part of a sample a member is, or ""; the sample's key): the name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    ending = ending.lower()
    part = (
        "image"
        if f".{ending}" in IMAGE_SUFFIXES
        else {"txt": "text", "caption": "text", "json": "json"}.get(ending, "")
    )
    return (part, f"{folder}{slash}{stem}".removeprefix("./")) if stem and dot else ("", "")


def _rows(samples: dict[str, dict[str, tuple[int, int]]], lost: bool = False) -> np.ndarray:
    keys = [key.encode("utf-8", "replace") for key in samples] + [b""] * lost
    dtype = [("key", f"S{max([1, *map(len, keys)])}")]
    dtype += [field for part in PARTS for field in ((part, "<u8"), (f"{part}_size", "<u8"))]
    rows = np.zeros(len(keys), dtype=dtype)
    rows["key"] = keys
    for number, parts in enumerate(samples.values()):
        for part, (offset, size) in parts.items():
            rows[part][number], rows[f"{part}_size"][number] = offset, size
    return rows


def _numbered(rows: np.ndarray, number: int) -> np.ndarray:
    """The rows of a shard, with its number as another column."""
    result = np.zeros(len(rows), dtype=[*rows.dtype.descr, ("shard", "<u4")])
    for name in rows.dtype.names or ():
        result[name] = rows[name]
    result["shard"] = number
    return result


def _common_root(shards: Sequence[Path]) -> Path:
    """The folder above all shards; its parent when the folder itself is called train, val or test."""
    root = shards[0].parent
    while not all(shard.is_relative_to(root) for shard in shards):
        root = root.parent
    return root.parent if split_word(root.name) else root


def _edges(shard: Path) -> bytes:
    with shard.open("rb") as file:
        head = file.read(EDGE)
        file.seek(max(0, shard.stat().st_size - EDGE))
        return hashlib.blake2b(head + file.read(), digest_size=16).digest()
