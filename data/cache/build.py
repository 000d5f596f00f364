"""Makes a cache: shard by shard, each written whole, so that a run killed at any instant goes on at its last shard.

A shard covers a fixed range of the reader's items, and batches are cut inside it, so that what is written depends on
the data and the recipe alone: a cache that was interrupted has the same bytes as one that was not. Several processes
(RANK and WORLD_SIZE, as launchers set them) share the shards of one folder without talking to each other.
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

NUM_PROBED = 256  # items that the expected size is measured on
ABANDONED = 3600  # seconds after which a file that is not yet under its name will never be
NUM_COMPARED = 4  # items whose token features are compared with the recipe's encoder before they are taken over


@dataclass(frozen=True)
class Settings:
    """items_per_shard: what an interruption costs at most; batch_size: items that pass the networks together;
    workers: threads that decode pictures; max_bad: share of bad items above which the data are refused.
    """

    items_per_shard: int = 1000
    batch_size: int = 32
    workers: int = 2
    max_bad: float = 0.05


@dataclass(frozen=True)
class Estimate:
    """What a cache will take. bytes_per_item counts all captions of an item."""

    num_items: int
    num_bytes: int
    bytes_per_item: float
    free: int
    """Bytes free on the disk."""
    finished: int = 0
    """Bytes that are there already."""

    def require(self, folder: Path) -> None:
        """Raises UserError when the disk has less room."""
        if self.free < self.num_bytes - self.finished:
            raise UserError(
                f"The cache will take about {size_in_words(self.num_bytes - self.finished)}, and "
                f"{size_in_words(self.free)} are free where {folder} lies. Make room, choose another --output, "
                "or cache fewer items (--num) or sizes (--resolution)."
            )


@dataclass(frozen=True)
class Summary:
    """What was made: items and bytes in the folder, and the items left out with their reasons."""

    num_items: int
    num_bytes: int
    new_items: int
    """Items computed by this call."""
    bad: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    """False when other processes still work on their shards."""


@dataclass(frozen=True)
class Part:
    """The range of a split's items that one shard covers."""

    split: str
    number: int
    items: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


class Builder:
    """One cache to be made in `folder`, from a reader for each split. Raises UserError when the folder holds something
    else, or a cache of other data, networks or settings.
    """

    def __init__(
        self,
        folder: Path,
        readers: Mapping[str, Reader],
        extractor: Extractor,
        settings: Settings | None = None,
        limits: Mapping[str, tuple[int | None, int]] | None = None,
    ) -> None:
        """limits: (limit, seed) that a split's reader was opened with, so that the same items can be found again."""
        self.folder, self.readers, self.extractor = folder, readers, extractor
        self.settings = settings or Settings()
        self.plan: dict[str, Any] = {
            "format": FORMAT,
            "features": {**extractor.describe(), "storage": extractor.options.storage},
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
            return  # new, or killed while the manifest was written
        before = read_manifest(self.folder)["plan"]
        different = [
            f"{name} ({_words(before_value)} -> {_words(value)})"
            for name, before_value, value in _differences(before, self.plan)
        ]
        if different:
            raise UserError(
                f"The cache in {self.folder} was begun with other data or settings: {'; '.join(different[:4])}. "
                "Go on with what it was begun with, or choose another --output."
            )

    # -- size

    def estimate(self) -> Estimate:
        """The expected size, from the shapes of the features and the captions of some items of each split."""
        total = sum(self._item_bytes(reader) * len(reader) for reader in self.readers.values())
        count = sum(map(len, self.readers.values()))
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        finished = sum(record["bytes"] for record in map(self._finished, self.parts) if record is not None)
        return Estimate(count, round(total), total / max(1, count), shutil.disk_usage(place).free, finished)

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
        captions = [caption for one in probed for caption in one]
        number += sum(len(caption.encode()) + 12 for caption in captions) / len(probed)
        if "text" in described and captions:
            tokens = self.extractor.num_tokens(captions)
            vectors = tokens + (len(captions) if self.extractor.pooled else 0)
            number += vectors * described["text"]["width"] * itemsize / len(probed)
        return number

    # -- making

    def run(self, progress: Progress | None = None) -> Summary:
        """Makes what is missing. progress(done, total) counts items."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            self._write_manifest({"plan": self.plan, "complete": False})
        self.extractor.to(self.extractor.options.device)
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
        """(good items, their features and keys), bad items: batch after batch, the next one decoded meanwhile."""
        reader, size = self.readers[part.split], self.settings.batch_size
        batches = [part.items[start : start + size] for start in range(0, len(part.items), size)]
        with ThreadPoolExecutor(self.settings.workers) as pool:

            def begin(indices: Sequence[int]) -> list[Future[list[Item | BadItem]]]:
                share = max(1, -(-len(indices) // self.settings.workers), reader.batch_hint)
                pieces = [indices[start : start + share] for start in range(0, len(indices), share)]
                return [pool.submit(reader.load, piece) for piece in pieces]

            pending = begin(batches[0])
            for following in [*batches[1:], None]:
                loaded = [item for future in pending for item in future.result()]
                pending = begin(following) if following is not None else []
                yield self._computed(loaded)

    def _computed(
        self, loaded: Sequence[Item | BadItem]
    ) -> tuple[tuple[list[Item], list[Features], list[bytes]], list[BadItem]]:
        items = [item for item in loaded if isinstance(item, Item)]
        bad = [item for item in loaded if isinstance(item, BadItem)]
        found = features_of(self.extractor, items) if items else []
        pairs = [(item, one) for item, one in zip(items, found, strict=True) if isinstance(one, Features)]
        bad += [one for one in found if isinstance(one, BadItem)]
        keys = [item_key(item, self.plan["features"]) for item, _ in pairs]
        return ([item for item, _ in pairs], [one for _, one in pairs], keys), bad

    def _finished(self, part: Part) -> dict[str, Any] | None:
        """What is written of a finished shard; None for one that is missing, unfinished or cut."""
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
                f"{len(bad)} of {total} items are bad so far, and at most {self.settings.max_bad:.0%} may be. Mend or "
                f"remove them, or raise data.max_bad.{listed}"
            )

    def _finish(self, new: int) -> Summary:
        found = [self._finished(part) for part in self.parts]
        records = [record for record in found if record is not None]
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
        """Removes what killed writes left; a younger file may be another process's that is being written."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):  # another process swept it
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        shards.write_bytes(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())

    def compare_imported(self) -> None:
        """Where features came with the data, compares those of a few items with the recipe's text encoder."""
        reader = next(iter(self.readers.values()))
        if "released" in reader.fields:
            some = [item for item in reader.load(range(min(NUM_COMPARED, len(reader)))) if isinstance(item, Item)]
            expect_same_encoder(self.extractor, some)


class Rows:
    """The rows of a shard in the making."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.items: list[Item] = []
        self.features: list[Features] = []
        self.keys: list[bytes] = []
        self.bad: list[tuple[str, str]] = []

    def add(self, items: Sequence[Item], features: Sequence[Features], keys: Sequence[bytes]) -> None:
        self.items += [Item(item.id, captions=item.captions) for item in items]  # their pictures are not needed again
        self.features += features
        self.keys += keys

    def about(self, split: str) -> dict[str, Any]:
        """What the file beside the shard says of it."""
        return {
            "split": split,
            "num_items": len(self.items),
            "num_captions": sum(len(item.captions) for item in self.items),
            "bad": self.bad,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        captions = [caption for item in self.items for caption in item.captions]
        joined = torch.frombuffer(bytearray(b"".join(self.keys) or b"\0"), dtype=torch.uint8)
        found = {"keys": joined[: KEY_BYTES * len(self.keys)].reshape(-1, KEY_BYTES)}
        for name, texts in (("ids", [item.id for item in self.items]), ("captions", captions)):
            found[name], found[name + shards.OFFSETS] = shards.pack_texts(texts)
        found["items" + shards.OFFSETS] = shards.offsets([len(item.captions) for item in self.items])
        for name in self.features[0].fixed if self.features else ():
            found[name] = torch.stack([one.fixed[name] for one in self.features])
        if self.extractor.text is not None:
            pieces = [tokens for one in self.features for tokens in one.text]
            lengths = [length for one in self.features for length in one.lengths]
            nothing = torch.zeros(0, self.extractor.text.width, dtype=STORAGE[self.extractor.options.storage])
            found["text"] = torch.cat([nothing, *pieces])
            found["text" + shards.OFFSETS] = shards.offsets([len(piece) for piece in pieces])
            found["text.lengths"] = torch.tensor(lengths, dtype=torch.int32)
            pooled = [vector for one in self.features for vector in one.pooled]
            if pooled:
                found["text.pooled"] = torch.stack(pooled)
        return found


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of all that differs in two plans."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        return [
            one for key in names for one in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [(name, before, now)]


def _words(value: Any) -> str:
    """A value of a plan, short enough for a sentence."""
    text = "none" if value is None else str(value)
    return f"{text[:24]}…" if len(text) > 28 else text
