"""A finished cache as training reads it: items by split and number, their features in batches.

B batch, N tokens, D width.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.source import Posterior
from crossflow.data.cache.extract import from_uint8
from crossflow.data.cache.keys import canonical
from crossflow.data.cache.shards import Shard

MANIFEST = "cache.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of an item's features: row `row` of shard `shard`."""

    cache: "Cache"
    shard: int
    row: int


class Cache:
    """The cache in `folder`. It can be pickled, and opens each shard on first access.

    `features` describes the content (`Extractor.describe`), `records` has one entry per shard. Raises UserError when
    the cache is missing, unfinished or from a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        if not manifest.get("complete"):
            raise UserError(
                f"The cache in {folder} is not finished. Repeat the command that started it to continue: "
                f"crossflow cache --output {folder} ..."
            )
        self.plan: dict[str, Any] = manifest["plan"]
        self.features: dict[str, Any] = self.plan["features"]
        self.records: list[dict[str, Any]] = manifest["shards"]
        self._shards: dict[int, Shard] = {}
        self._read_before: dict[int, bytearray] = {}  # shard -> flags of the items read so far
        self._fits_memory = sum(record["bytes"] for record in self.records) < _memory() / 2

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_read_before": {}}

    @property
    def splits(self) -> list[str]:
        """The cached splits."""
        return list(self.plan["data"])

    def rows(self, split: str) -> "Rows":
        """The items of a split, or of `all`. Raises UserError when the split is not cached."""
        if split != "all" and split not in self.splits:
            raise UserError(
                f"The cache in {self.folder} has {', '.join(self.splits)} but no {split!r}. Cache that split too "
                f"(crossflow cache --split {split} ...), or give other data for it (data.val=SPEC)."
            )
        return Rows(self, [n for n, record in enumerate(self.records) if split in ("all", record["split"])])

    def shard(self, number: int) -> Shard:
        """Shard `number`, opened on first access."""
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = Shard(self.folder / self.records[number]["file"])
        return shard

    def id(self, entry: Entry) -> str:
        """The id of an item."""
        return self.shard(entry.shard).text("ids", entry.row)

    def captions(self, entry: Entry) -> tuple[str, ...]:
        """The captions of an item."""
        shard = self.shard(entry.shard)
        return tuple(shard.text("captions", row) for row in shard.captions(entry.row))

    # -- features of a batch

    def fetch(self, entries: Sequence[Entry], which: Sequence[int], size: int) -> None:
        """Asks the system to read all features of a batch at once, rather than one after the other as they are copied.

        Skips items that were read before and are probably still in memory: a request costs a fifth of a copy.
        """
        fixed = [name for name in self.features["parts"] if name.endswith(f"_{size}")]
        for entry, number in zip(entries, which, strict=True):
            read_before = self._read_before.get(entry.shard)
            if read_before is None:
                read_before = self._read_before[entry.shard] = bytearray(self.records[entry.shard]["num_items"])
            if read_before[entry.row] and self._fits_memory:
                continue
            read_before[entry.row] = True
            shard = self.shard(entry.shard)
            for name in fixed:
                shard.will_need(name, entry.row, entry.row + 1)
            if "text" in shard:
                shard.will_need("text", *shard.span("text", shard.captions(entry.row)[number]))

    def moments(self, entries: Sequence[Entry], size: int) -> Posterior:
        """Posterior over raw latents (B, *latent) of pictures of `size` pixels, in the storage type.

        Scaling by a codec (`Codec.scaled`) gives float32.
        """
        moments = self.fixed(entries, f"moments_{size}")  # (B, 1 or 2, *latent): mean, log-variance
        return Posterior(moments[:, 0], moments[:, 1] if moments.shape[1] == 2 else None)

    def pixels(self, entries: Sequence[Entry], size: int) -> Tensor:
        """Pictures (B, 3, S, S) float32 in [-1, 1]."""
        return from_uint8(self.fixed(entries, f"pixels_{size}"))

    def fixed(self, entries: Sequence[Entry], name: str) -> Tensor:
        """Rows (B, ...) of a tensor with one row per item, in the storage type."""
        return self._rows(name, [(entry.shard, entry.row) for entry in entries])

    def _rows(self, name: str, places: Sequence[tuple[int, int]]) -> Tensor:
        """Row `row` of the tensor in shard `number`, for each (number, row)."""
        first = self.shard(places[0][0])
        like = first.arrays[name]
        result = np.empty((len(places), *like.shape[1:]), like.dtype)
        for place, (number, row) in enumerate(places):
            result[place] = self.shard(number).arrays[name][row]
        return torch.from_numpy(result).view(first.dtypes[name])

    def text(self, entries: Sequence[Entry], which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features (B, N, D), zero where padding was dropped, and mask (B, N) bool, of caption `which` of each item.

        Features stay in the storage type, which halves the bytes copied to a device, where `Batch.to` converts them to
        float32.
        """
        first, part = self.shard(entries[0].shard), self.features["parts"]["text"]
        num_tokens = part["max_length"]
        features = np.empty((len(entries), num_tokens, part["width"]), first.arrays["text"].dtype)
        lengths = np.empty((len(entries), 1), np.int64)
        for place, (entry, number) in enumerate(zip(entries, which, strict=True)):  # the innermost loop of training
            arrays = self.shard(entry.shard).arrays
            caption = int(arrays["items.offsets"][entry.row]) + number
            begin, end = arrays["text.offsets"][caption : caption + 2].tolist()
            length = end - begin
            features[place, :length] = arrays["text"][begin:end]
            features[place, length:] = 0
            lengths[place] = arrays["text.lengths"][caption]
        mask = torch.from_numpy(np.arange(num_tokens) < lengths)
        return torch.from_numpy(features).view(first.dtypes["text"]), mask

    def pooled(self, entries: Sequence[Entry], which: Sequence[int]) -> Tensor:
        """One vector (B, D) per caption, in the storage type."""
        rows = [
            self.shard(entry.shard).captions(entry.row)[number] for entry, number in zip(entries, which, strict=True)
        ]
        return self._rows("text.pooled", [(entry.shard, row) for entry, row in zip(entries, rows, strict=True)])

    # -- agreement with a recipe

    def expect(self, needed: Mapping[str, Any]) -> None:
        """Raises UserError unless the cache has the features `needed` (`Extractor.describe`), by the same networks."""
        for name, identity in needed["networks"].items():
            cached = self.features["networks"].get(name)
            if cached is None:
                raise UserError(f"The cache in {self.folder} has no features of the {NETWORKS[name]}. {_ADVICE}")
            other = [
                f"{key} {_short(cached.get(key))} instead of {_short(value)}"
                for key, value in identity.items()
                if cached.get(key) != value
            ]
            if other:
                raise UserError(
                    f"The cache in {self.folder} was built with another {NETWORKS[name]} than the recipe's: "
                    f"{', '.join(other)}. {_ADVICE}"
                )
        for name, part in needed["parts"].items():
            problem = _mismatch(name, part, self.features["parts"])
            if problem:
                raise UserError(f"The cache in {self.folder} does not match the recipe: {problem}. {_ADVICE}")

    def fingerprint(self) -> str:
        """32 hex digits, from the description of the features and the checksums of all shards."""
        content = canonical([self.plan["features"], [record["sha256"] for record in self.records]])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


NETWORKS = {"codec": "image codec", "text": "text encoder", "tower": "image tower"}
_ADVICE = "Build a cache with this recipe (crossflow cache --config ...), or train with the recipe of this cache."


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else str(value)


def _mismatch(name: str, part: Mapping[str, Any], available: Mapping[str, Any]) -> str:
    """Why the cached part `name` cannot serve as `part`; "" if it can."""
    cached = available.get(name)
    if cached is None:
        return f"it has no {name.replace('_', ' of size ')} (it has {', '.join(available)})"
    for key, value in part.items():
        # Having more than needed is fine.
        enough = (key == "padding" and cached[key] == "kept") or (key == "pooled" and cached[key])
        if cached[key] != value and not enough:
            return f"{name}.{key} is {cached[key]}, but {value} is needed"
    return ""


class Rows:
    """The items of some shards of a cache, in order."""

    def __init__(self, cache: Cache, numbers: Sequence[int]) -> None:
        self.cache, self.numbers = cache, list(numbers)
        self.starts = [0, *itertools.accumulate(cache.records[number]["num_items"] for number in numbers)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)} in the cache")
        place = bisect.bisect_right(self.starts, index) - 1
        return Entry(self.cache, self.numbers[place], index - self.starts[place])


def _memory() -> float:
    """Bytes of this machine's memory; infinity where that is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a cache's manifest. Raises UserError when it is missing or unreadable."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a feature cache: it has no {MANIFEST}. Build one by crossflow cache.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["plan"]["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Build the cache again, in another folder.") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, but this version of crossflow reads format {FORMAT}.")
    return content
