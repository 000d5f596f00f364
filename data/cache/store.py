"""A finished cache as training reads it: items by split and number, their features gathered into batches.

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
    """Where the features of an item lie."""

    cache: "Cache"
    shard: int
    row: int


class Cache:
    """The cache in `folder`; can be pickled, and opens its shards when they are first asked for.

    features: what it holds (`Extractor.describe`); records: one per shard. Raises UserError when there is none, when it
    is unfinished, or from a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        if not manifest.get("complete"):
            raise UserError(
                f"The cache in {folder} is not finished. Give the command that began it again, and it goes on where it "
                f"stopped: crossflow cache --output {folder} ..."
            )
        self.plan: dict[str, Any] = manifest["plan"]
        self.features: dict[str, Any] = self.plan["features"]
        self.records: list[dict[str, Any]] = manifest["shards"]
        self._shards: dict[int, Shard] = {}
        self._seen: dict[int, bytearray] = {}  # shard -> which of its items were read
        self._fits_memory = sum(record["bytes"] for record in self.records) < _memory() / 2

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_seen": {}}

    @property
    def splits(self) -> list[str]:
        return list(self.plan["data"])

    def rows(self, split: str) -> "Rows":
        """The items of a split, or of `all`. Raises UserError when the cache lacks it."""
        if split != "all" and split not in self.splits:
            raise UserError(
                f"The cache in {self.folder} holds {', '.join(self.splits)} and no {split!r}. Cache that split too "
                f"(crossflow cache --split {split} ...), or give other data for it (data.val=SPEC)."
            )
        return Rows(self, [n for n, record in enumerate(self.records) if split in ("all", record["split"])])

    def shard(self, number: int) -> Shard:
        found = self._shards.get(number)
        if found is None:
            found = self._shards[number] = Shard(self.folder / self.records[number]["file"])
        return found

    def id(self, entry: Entry) -> str:
        return self.shard(entry.shard).text("ids", entry.row)

    def captions(self, entry: Entry) -> tuple[str, ...]:
        shard = self.shard(entry.shard)
        return tuple(shard.text("captions", row) for row in shard.captions(entry.row))

    # -- features, gathered

    def fetch(self, entries: Sequence[Entry], which: Sequence[int], size: int) -> None:
        """Asks the system for all that a batch needs at once, instead of waiting for each piece when it is copied.

        Not for what was read before and is likely to be in memory still: asking costs a fifth of copying.
        """
        fixed = [name for name in self.features["parts"] if name.endswith(f"_{size}")]
        for one, number in zip(entries, which, strict=True):
            seen = self._seen.get(one.shard)
            if seen is None:
                seen = self._seen[one.shard] = bytearray(self.records[one.shard]["num_items"])
            if seen[one.row] and self._fits_memory:
                continue
            seen[one.row] = True
            shard = self.shard(one.shard)
            for name in fixed:
                shard.will_need(name, one.row, one.row + 1)
            if "text" in shard:
                shard.will_need("text", *shard.span("text", shard.captions(one.row)[number]))

    def moments(self, entries: Sequence[Entry], size: int) -> Posterior:
        """Posterior over raw latents (B, *latent) of pictures of `size` pixels, in the type they are stored in; scaling
        by a codec (`Codec.scaled`) gives float32.
        """
        found = self.fixed(entries, f"moments_{size}")  # (B, 1 or 2, *latent): mean, log-variance
        return Posterior(found[:, 0], found[:, 1] if found.shape[1] == 2 else None)

    def pixels(self, entries: Sequence[Entry], size: int) -> Tensor:
        """Pictures (B, 3, S, S) float32 in [-1, 1]."""
        return from_uint8(self.fixed(entries, f"pixels_{size}"))

    def fixed(self, entries: Sequence[Entry], name: str) -> Tensor:
        """The rows of a tensor of one row per item: (B, ...) in the type they are stored in."""
        return self._rows(name, [(one.shard, one.row) for one in entries])

    def _rows(self, name: str, places: Sequence[tuple[int, int]]) -> Tensor:
        """The rows `row` of the tensor in shard `number`, for each (number, row)."""
        first = self.shard(places[0][0])
        like = first.arrays[name]
        result = np.empty((len(places), *like.shape[1:]), like.dtype)
        for place, (number, row) in enumerate(places):
            result[place] = self.shard(number).arrays[name][row]
        return torch.from_numpy(result).view(first.dtypes[name])

    def text(self, entries: Sequence[Entry], which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features (B, N, D), zero where padding was dropped, and mask (B, N) bool of caption `which` of each item.

        Features are in the type they are stored in: half of the bytes on the way to a device, where `Batch.to` makes
        them float32.
        """
        first, part = self.shard(entries[0].shard), self.features["parts"]["text"]
        num_tokens = part["max_length"]
        features = np.empty((len(entries), num_tokens, part["width"]), first.arrays["text"].dtype)
        lengths = np.empty((len(entries), 1), np.int64)
        for place, (one, number) in enumerate(zip(entries, which, strict=True)):  # the innermost loop of training
            arrays = self.shard(one.shard).arrays
            caption = int(arrays["items.offsets"][one.row]) + number
            begin, end = arrays["text.offsets"][caption : caption + 2].tolist()
            length = end - begin
            features[place, :length] = arrays["text"][begin:end]
            features[place, length:] = 0
            lengths[place] = arrays["text.lengths"][caption]
        mask = torch.from_numpy(np.arange(num_tokens) < lengths)
        return torch.from_numpy(features).view(first.dtypes["text"]), mask

    def pooled(self, entries: Sequence[Entry], which: Sequence[int]) -> Tensor:
        """One vector (B, D) per caption, in the type they are stored in."""
        rows = [self.shard(one.shard).captions(one.row)[number] for one, number in zip(entries, which, strict=True)]
        return self._rows("text.pooled", [(one.shard, row) for one, row in zip(entries, rows, strict=True)])

    # -- agreement with a recipe

    def expect(self, needed: Mapping[str, Any]) -> None:
        """Raises UserError unless the cache holds what a recipe needs (`Extractor.describe`), by the same networks."""
        ours = self.features
        for name, identity in needed["networks"].items():
            cached = ours["networks"].get(name)
            if cached is None:
                raise UserError(f"The cache in {self.folder} has no features of a {NETWORKS[name]}. {_AGAIN}")
            other = [
                f"{key} {_short(cached.get(key))} instead of {_short(value)}"
                for key, value in identity.items()
                if cached.get(key) != value
            ]
            if other:
                raise UserError(
                    f"The cache in {self.folder} was made with another {NETWORKS[name]} than the recipe's: "
                    f"{', '.join(other)}. {_AGAIN}"
                )
        for name, part in needed["parts"].items():
            problem = _lacks(name, part, ours["parts"])
            if problem:
                raise UserError(f"The cache in {self.folder} does not fit the recipe: {problem}. {_AGAIN}")

    def fingerprint(self) -> str:
        """32 hex digits of the plan and the checksums of all shards."""
        content = canonical([self.plan["features"], [record["sha256"] for record in self.records]])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


NETWORKS = {"codec": "image codec", "text": "text encoder", "tower": "image tower"}
_AGAIN = "Make the cache with this recipe (crossflow cache --config ...), or train with the recipe it was made with."


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else str(value)


def _lacks(name: str, part: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """What the cached part called `name` lacks to serve as `part`, "" when nothing."""
    cached = there.get(name)
    if cached is None:
        return f"it has no {name.replace('_', ' of size ')} (it has {', '.join(there)})"
    for key, value in part.items():
        # More than is needed does no harm.
        enough = (key == "padding" and cached[key] == "kept") or (key == "pooled" and cached[key])
        if cached[key] != value and not enough:
            return f"{name}.{key} is {cached[key]}, and {value} is needed"
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
    """Bytes of this machine's memory; without end where that cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a cache's manifest. Raises UserError when there is none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no feature cache: there is no {MANIFEST} in it. Make one by crossflow cache.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["plan"]["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Make the cache again, in another folder.") from error
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}, and this version of crossflow reads format {FORMAT}.")
    return content
