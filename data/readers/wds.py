"""`wds:DIR`: shards of LAION's kind (webdataset, img2dataset): tar files with KEY.jpg, KEY.txt and KEY.json per sample.

The headers of each shard are read once and kept as an index of offsets; then one seek reads any sample. So shards are
read like any other data: shuffled by (seed, epoch), across all shards if they are local; divided among processes and
workers without repeating or dropping a sample; and resumed exactly, without the state of a stream.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.readers.jsonl import CAPTION_KEYS
from crossflow.data.readers.samples import JSON, PICTURE, TEXT, Places, Samples, ShardOrder
from crossflow.data.readers.shards import RemoteShards, open_shards
from crossflow.data.readers.tar_index import PARTS
from crossflow.data.records import LazyIds
from crossflow.data.spec import Option, Options, parse_options, split_location
from crossflow.data.splits import choose, expect_hashed

if TYPE_CHECKING:
    from crossflow.core.noise import Order

LARGEST = 2**28  # bytes of one sample's file


class WdsReader(Reader):
    """Pictures with captions in tar shards, on this machine or in object storage.

    Splits are the folders train/, val/ and test/ that hold the shards, or else a hash of the samples' names. Samples
    without a picture are bad items, and so is the missing end of a truncated shard.
    """

    prefix = "wds"
    layout = (
        "tar shards: a folder of them, 'DIR/*.tar' or 'DIR/{00000..00099}.tar', with KEY.jpg, KEY.txt and KEY.json; "
        "DIR may be a URL such as s3://BUCKET/NAME"
    )
    offers = frozenset(("image", "captions"))
    options: ClassVar[Options] = {
        "caption": Option("field of KEY.json with the caption, instead of KEY.txt"),
        "keep": Option("gigabytes of remote shards to keep on this machine", "200", number=True, is_place=True),
        "shuffle": Option("number of remote shards that a batch draws on", "8", number=True),
    }

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.split = f"{self.prefix}:{location}", split
        place, settings = split_location(location)
        self.option = parse_options(settings, self.options, self.spec)
        self.caption = self.option["caption"]
        keep = float("inf") if self.option["keep"] == "none" else 1e9 * float(self.option["keep"])
        try:
            self.shards = open_shards(place, self.spec, keep, self.layout)
            if isinstance(self.shards, RemoteShards):
                self.shards.expect_room(2 * self._width())  # those of a group, and the next ones
            self.samples = Samples(self.shards, self.spec)
        except OSError as error:
            raise UserError(f"{self.spec!r} cannot be read: {error}.") from error
        self._select(limit, seed)
        if not len(self.ids):
            raise UserError(f"{self.spec!r} has no samples in split {split!r}. Expected {self.layout}.")
        parts = int(np.bitwise_or.reduce(self._flags(), initial=0))
        with_text = parts & (JSON if self.caption else JSON | TEXT)
        self.fields = frozenset(("image", "captions") if with_text else ("image",))
        self._order: ShardOrder | None = None  # that of the last epoch that was asked for

    def _select(self, limit: int | None, seed: int) -> None:
        """Chooses the samples of the split, by `selection`, the name of their stored rows."""
        samples = self.samples
        if self.split != "all" and samples.by_folder and not samples.num_items[self.split]:
            present = ", ".join(sorted(word for word, count in samples.num_items.items() if count))
            raise UserError(f"{self.spec!r} has shards for {present} but none for {self.split!r}.")
        if not samples.by_folder:
            expect_hashed(self.spec, samples.num_items, self.split)
        self.selection = self.split
        self.ids = _Ids(self)
        if limit is not None and limit < len(self.ids):
            name = f"{self.split}-limit{limit}-seed{seed}"
            if samples.store.array(name) is None:
                samples.store.keep(name, np.asarray(self.places)[choose(self.ids, limit, seed)])
            self.selection = name

    @property
    def places(self) -> Places:
        """The row of each item among the samples of all shards, ascending."""
        return range(len(self.samples.rows)) if self.selection == "all" else self.samples.array(self.selection)

    def _flags(self) -> np.ndarray:
        """uint8 (items,); see `Samples`."""
        return self.samples.flags if self.selection == "all" else self.samples.flags[self.places]

    def order(self, seed: int, epoch: int) -> "Order":
        """The order of an epoch; that of remote shards keeps few of them in use at a time."""
        if not isinstance(self.shards, RemoteShards):
            return super().order(seed, epoch)
        if self._order is None or (self._order.seed, self._order.epoch) != (seed, epoch):
            bounds = np.searchsorted(self.places, self.samples.starts)
            self._order = ShardOrder(bounds, seed, epoch, self._width())
        return self._order

    def _width(self) -> int:
        """Number of remote shards among which samples are shuffled."""
        return len(self.shards) if self.option["shuffle"] == "none" else max(1, int(float(self.option["shuffle"])))

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        """Several items; the shards that come next in the epoch are downloaded meanwhile."""
        if isinstance(self.shards, RemoteShards):
            for shard in dict.fromkeys(int(self.samples.rows["shard"][self.places[index]]) for index in indices):
                following = range(shard, min(shard + 2, len(self.shards)))
                self.shards.ahead(following if self._order is None else self._order.near(shard))
        return super().load(indices)

    def __getitem__(self, index: int) -> Item:
        from crossflow.data.images import is_grey, load_image

        row, id = self._row(index), self.ids[index]
        try:
            metadata = self._json(row)
            status = metadata.get("status")
            if isinstance(status, str) and status != "success":
                raise ValueError(f"it was not downloaded: {metadata.get('error_message') or status}")
            if not row["image_size"]:
                raise ValueError(self.samples.problem(int(self.places[index])))
            captions = self._captions(row, metadata)
            if "captions" in self.required and not captions:
                raise ValueError("has no caption")
            content = self._bytes(row, "image")
            image = load_image(content)
            return Item(id, image, captions, grey=is_grey(image, content))
        except (ValueError, OSError) as error:
            raise BadItem(id, str(error)) from error

    def _row(self, index: int) -> np.void:
        return self.samples.rows[self.places[index]]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, without its picture; none when they are unreadable."""
        try:
            row = self._row(index)
            return self._captions(row, self._json(row))
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
        with self.shards.open(int(row["shard"])) as file:
            file.seek(int(row[part]))
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the shard is shorter than when it was indexed")
        return content

    @property
    def problems(self) -> dict[str, str]:
        """Samples without a picture: id -> reason."""
        bad = np.flatnonzero(self._flags() & PICTURE == 0).tolist()
        return {self.ids[index]: self.samples.problem(int(self.places[index])) for index in bad}

    def fingerprint(self) -> str:
        """From the samples' names, offsets and sizes, and the ends of up to 256 shards; kept in the index."""
        stride = -(-len(self.shards) // 256)
        ends = [self.shards.content_digest(number) for number in range(0, len(self.shards), stride)]
        now = hashlib.blake2b(b"".join(ends) + self.caption.encode(), digest_size=16).hexdigest()
        name = f"{self.selection}-fingerprint-{now}"
        fingerprint = self.samples.store.text(name)
        if fingerprint is None:
            digest = hashlib.blake2b(f"{self.caption} {len(self.ids)}".encode(), digest_size=16)
            digest.update(json.dumps(self.shards.names).encode())
            for field in ("key", "shard", *PARTS):
                for rows in self.samples.chunks(self.places):
                    digest.update(np.ascontiguousarray(rows[field]).tobytes())
            for end in ends:
                digest.update(end)
            fingerprint = digest.hexdigest()
            self.samples.store.keep(name, fingerprint)
        return fingerprint

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The name of a tar file."""
        if path.is_file():
            return path.name if path.suffix == ".tar" else ""
        return next((file.name for file in sorted(path.glob("*.tar"))), "") if path.is_dir() else ""


class _Ids(LazyIds):
    """SHARD/KEY of each item."""

    def __init__(self, reader: WdsReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.places)

    def id_at(self, index: int) -> str:
        """SHARD/KEY, or SHARD/(truncated) for the lost end of a shard."""
        return self.reader.samples.id(int(self.reader.places[index]))
