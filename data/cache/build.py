"""Building a cache shard by shard, each written atomically, so that an interrupted build continues at its last shard.

A shard covers a fixed range of the reader's items, and batches never cross its bounds, so the bytes depend on the data
and the recipe alone: an interrupted build ends with the same files as an uninterrupted one. Several processes (RANK and
WORLD_SIZE, as set by launchers) share the shards of one folder without communicating.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crossflow.core import launcher
from crossflow.core.errors import UserError
from crossflow.core.files import TEMPORARY, size_in_words
from crossflow.core.progress import Progress
from crossflow.data.cache import shards
from crossflow.data.cache.extract import STORAGE, Extractor, Features
from crossflow.data.cache.keys import KEY_BYTES, item_key
from crossflow.data.cache.released import expect_same_encoder, features_of
from crossflow.data.cache.store import FORMAT, MANIFEST, read_manifest
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader

NUM_PROBED = 256  # items from which the size is estimated
ABANDONED = 3600  # seconds after which a temporary file is taken for the remains of a killed process
NUM_COMPARED = 4  # items whose imported token features are compared with the recipe's encoder


@dataclass(frozen=True)
class Settings:
    """How a cache is built."""

    items_per_shard: int = 1000
    """Items per file, the most that an interruption can lose."""
    batch_size: int = 32
    """Items per forward pass of the networks."""
    workers: int = 2
    """Threads that decode pictures."""
    max_bad: float = 0.05
    """Share of bad items in [0, 1] above which the data are refused."""


@dataclass(frozen=True)
class Estimate:
    """The expected size of a cache. `bytes_per_item` includes all captions of an item."""

    num_items: int
    num_bytes: int
    bytes_per_item: float
    free: int
    """Free bytes on the disk."""
    finished: int = 0
    """Bytes of the finished shards."""

    def require(self, folder: Path) -> None:
        """Raises UserError when the disk has less free space."""
        if self.free < self.num_bytes - self.finished:
            raise UserError(
                f"The cache will take about {size_in_words(self.num_bytes - self.finished)}, but only "
                f"{size_in_words(self.free)} are free on the disk of {folder}. Free some space, choose another "
                "--output, or cache fewer items (--num) or sizes (--resolution)."
            )


@dataclass(frozen=True)
class Summary:
    """The result of a build: items and bytes in the folder, and the bad items with their reasons."""

    num_items: int
    num_bytes: int
    new_items: int
    """Items computed in this call."""
    bad: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    """False while other processes are still computing their shards."""


@dataclass(frozen=True)
class Part:
    """The range of a split's items that one shard covers."""

    split: str
    number: int
    items: range

    @property
    def name(self) -> str:
        """File name of the shard without its ending."""
        return f"{self.split}-{self.number:05d}"


class Builder:
    """Builds one cache in `folder` from a reader for each split.

    Raises UserError when the folder contains something else, or a cache of other data, networks or settings.
    """

    def __init__(
        self,
        folder: Path,
        readers: Mapping[str, Reader],
        extractor: Extractor,
        settings: Settings | None = None,
        limits: Mapping[str, tuple[int | None, int]] | None = None,
    ) -> None:
        """limits: (limit, seed) with which a split's reader was opened, so that the same items can be read again."""
        self.folder, self.readers, self.extractor = folder, readers, extractor
        self.settings = settings or Settings()
        self.plan: dict[str, Any] = {
            "format": FORMAT,
            "features": {**extractor.describe(), **extractor.numbers()},
            "data": {
                split: {
                    "spec": reader.spec,
                    "items": len(reader),
                    "limit": (limits or {}).get(split, (None, 0))[0],
                    "seed": (limits or {}).get(split, (None, 0))[1],
                    "fingerprint": reader.fingerprint(),
                }
                for split, reader in readers.items()
            },
            "items_per_shard": self.settings.items_per_shard,
        }
        self.parts = [
            Part(split, number, range(start, min(start + self.settings.items_per_shard, len(reader))))
            for split, reader in readers.items()
            for number, start in enumerate(range(0, len(reader), self.settings.items_per_shard))
        ]
        self._expect_same()

    def _expect_same(self) -> None:
        if not self.folder.is_dir() or all(path.name.startswith(".") for path in self.folder.iterdir()):
            return  # a new folder, or one whose build was killed before the manifest was written
        before = read_manifest(self.folder)["plan"]
        different = [
            f"{name} ({_words(before_value)} -> {_words(value)})"
            for name, before_value, value in _differences(before, self.plan)
        ]
        if different:
            raise UserError(
                f"The cache in {self.folder} was started with other data or settings: {'; '.join(different[:4])}. "
                "Continue with the same ones, or choose another --output."
            )

    # -- size

    def estimate(self) -> Estimate:
        """The expected size, from the shapes of the features and a sample of the captions of each split."""
        total = sum(self._item_bytes(reader) * len(reader) for reader in self.readers.values())
        count = sum(map(len, self.readers.values()))
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        finished = sum(record["bytes"] for record in map(self._finished, self.parts) if record is not None)
        return Estimate(count, round(total), total / max(1, count), shutil.disk_usage(parent).free, finished)

    def _item_bytes(self, reader: Reader) -> float:
        """Mean bytes of an item of a split."""
        described, itemsize = self.extractor.describe()["parts"], STORAGE[self.extractor.options.storage].itemsize
        number = 2.0 * KEY_BYTES + 24
        for name, part in described.items():
            if name != "text":
                values = torch.Size(part["shape"]).numel()
                spread = 2 if part.get("spread") else 1
                number += values * (1 if name.startswith("pixels") else itemsize * spread)
        stride = -(-len(reader) // NUM_PROBED)
        probed = [reader.captions(index) for index in range(0, len(reader), stride)]
        captions = [caption for item_captions in probed for caption in item_captions]
        number += sum(len(caption.encode()) + 12 for caption in captions) / len(probed)
        if "text" in described and captions:
            tokens = self.extractor.num_tokens(captions)
            vectors = tokens + (len(captions) if self.extractor.pooled else 0)
            number += vectors * described["text"]["width"] * itemsize / len(probed)
        return number

    # -- building

    def run(self, progress: Progress | None = None) -> Summary:
        """Computes and writes the missing shards. `progress(done, total)` counts items."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            self._write_manifest({"plan": self.plan, "complete": False})
        self.extractor.prepare()
        total, new = sum(len(part.items) for part in self.parts), 0
        done = sum(len(part.items) for part in self.parts if self._finished(part) is not None)
        rank, world = launcher.rank(), launcher.world_size()
        bad = self._bad()
        for place, part in enumerate(self.parts):
            if place % world != rank or self._finished(part) is not None:
                continue
            rows = Rows(self.extractor)
            for good, skipped in self._batches(part):
                rows.add(*good)
                bad |= {item.id: item.reason for item in skipped}
                self._expect_few(bad)
                done += len(good[0]) + len(skipped)
                new += len(good[0])
                if progress is not None:
                    progress(done, total)
                rows.bad += [(item.id, item.reason) for item in skipped]
            shards.write_shard(self.folder / f"{part.name}.safetensors", rows.tensors(), rows.about(part.split))
        return self._finish(new)

    def _batches(self, part: Part) -> "Iterator[tuple[tuple[list[Item], list[Features], list[bytes]], list[BadItem]]]":
        """(good items, their features and keys), bad items: batch by batch, while the next one is decoded."""
        reader, size = self.readers[part.split], self.settings.batch_size
        batches = [part.items[start : start + size] for start in range(0, len(part.items), size)]
        with ThreadPoolExecutor(self.settings.workers) as pool:

            def submit(indices: Sequence[int]) -> list[Future[list[Item | BadItem]]]:
                share = max(1, -(-len(indices) // self.settings.workers), reader.batch_hint)
                pieces = [indices[start : start + share] for start in range(0, len(indices), share)]
                return [pool.submit(reader.load, piece) for piece in pieces]

            pending = submit(batches[0])
            for following in [*batches[1:], None]:
                loaded = [item for future in pending for item in future.result()]
                pending = submit(following) if following is not None else []
                yield self._computed(loaded)

    def _computed(
        self, loaded: Sequence[Item | BadItem]
    ) -> tuple[tuple[list[Item], list[Features], list[bytes]], list[BadItem]]:
        items = [item for item in loaded if isinstance(item, Item)]
        bad = [item for item in loaded if isinstance(item, BadItem)]
        results = features_of(self.extractor, items) if items else []
        pairs = [(item, result) for item, result in zip(items, results, strict=True) if isinstance(result, Features)]
        bad += [result for result in results if isinstance(result, BadItem)]
        keys = [item_key(item, self.plan["features"]) for item, _ in pairs]
        return ([item for item, _ in pairs], [features for _, features in pairs], keys), bad

    def _finished(self, part: Part) -> dict[str, Any] | None:
        """The record of a finished shard; None when it is missing, unfinished or truncated."""
        path = self.folder / f"{part.name}.safetensors"
        try:
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return record if record["bytes"] == path.stat().st_size else None
        except (OSError, ValueError, KeyError):
            return None

    def _bad(self) -> dict[str, str]:
        records = (self._finished(part) for part in self.parts)
        return {id: reason for record in records if record is not None for id, reason in record["bad"]}

    def _expect_few(self, bad: Mapping[str, str]) -> None:
        total = sum(map(len, self.readers.values()))
        if len(bad) > self.settings.max_bad * total or len(bad) == total:
            listed = "".join(f"\n  {id}: {reason}" for id, reason in list(bad.items())[:10])
            raise UserError(
                f"{len(bad)} of {total} items are bad so far; the limit is {self.settings.max_bad:.0%}. Repair "
                f"or remove them, or raise data.max_bad.{listed}"
            )

    def _finish(self, new: int) -> Summary:
        records = [record for part in self.parts if (record := self._finished(part)) is not None]
        complete = len(records) == len(self.parts)
        if complete:
            self._write_manifest({"plan": self.plan, "complete": True, "shards": records})
            self._sweep()
        return Summary(
            sum(record["num_items"] for record in records),
            sum(record["bytes"] for record in records),
            new,
            self._bad(),
            complete,
        )

    def _sweep(self) -> None:
        """Removes the temporary files of killed processes; younger ones may be in use by another process."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        shards.write_bytes(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())

    def compare_imported(self) -> None:
        """Compares imported features, if any, of a few items with those of the recipe's text encoder."""
        reader = next(iter(self.readers.values()))
        if "released" in reader.fields:
            items = [item for item in reader.load(range(min(NUM_COMPARED, len(reader)))) if isinstance(item, Item)]
            expect_same_encoder(self.extractor, items)


class Rows:
    """The rows of a shard under construction."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.items: list[Item] = []
        self.features: list[Features] = []
        self.keys: list[bytes] = []
        self.bad: list[tuple[str, str]] = []

    def add(self, items: Sequence[Item], features: Sequence[Features], keys: Sequence[bytes]) -> None:
        """Appends a batch of items."""
        self.items += [Item(item.id, captions=item.captions) for item in items]  # without their pictures
        self.features += features
        self.keys += keys

    def about(self, split: str) -> dict[str, Any]:
        """The content of the JSON file beside the shard, except for name, size and checksum."""
        return {
            "split": split,
            "num_items": len(self.items),
            "num_captions": sum(len(item.captions) for item in self.items),
            "bad": self.bad,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the shard by name."""
        captions = [caption for item in self.items for caption in item.captions]
        joined = torch.frombuffer(bytearray(b"".join(self.keys) or b"\0"), dtype=torch.uint8)
        tensors = {"keys": joined[: KEY_BYTES * len(self.keys)].reshape(-1, KEY_BYTES)}
        for name, texts in (("ids", [item.id for item in self.items]), ("captions", captions)):
            tensors[name], tensors[name + shards.OFFSETS] = shards.pack_texts(texts)
        tensors["items" + shards.OFFSETS] = shards.offsets([len(item.captions) for item in self.items])
        for name in self.features[0].fixed if self.features else ():
            tensors[name] = torch.stack([features.fixed[name] for features in self.features])
        if self.extractor.text is not None:
            pieces = [tokens for features in self.features for tokens in features.text]
            lengths = [length for features in self.features for length in features.lengths]
            nothing = torch.zeros(0, self.extractor.text.width, dtype=STORAGE[self.extractor.options.storage])
            tensors["text"] = torch.cat([nothing, *pieces])
            tensors["text" + shards.OFFSETS] = shards.offsets([len(piece) for piece in pieces])
            tensors["text.lengths"] = torch.tensor(lengths, dtype=torch.int32)
            pooled = [vector for features in self.features for vector in features.pooled]
            if pooled:
                tensors["text.pooled"] = torch.stack(pooled)
        return tensors


def _differences(before: object, after: object, name: str = "") -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of all differences between two plans."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [
            difference
            for key in keys
            for difference in _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == after else [(name, before, after)]


def _words(value: object) -> str:
    """A value of a plan, shortened for a message."""
    text = "none" if value is None else str(value)
    return f"{text[:24]}…" if len(text) > 28 else text
