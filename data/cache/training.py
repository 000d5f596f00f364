"""Training from a cache: the features of a batch of examples. Everything else is as without a cache.

An example of a cached item has "entry" (the place of its features) instead of "image", and "which" caption was drawn.
Its latent is sampled from the moments with the example's own seed, keyed by (seed, epoch, index): a new sample each
epoch, the same one after resuming, and the one that training without a cache would draw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crossflow.core.source import Posterior
from crossflow.data.cache.store import Cache, Entry
from crossflow.data.reader import Reader
from crossflow.networks.codecs.base import Codec
from crossflow.networks.codecs.registry import build_codec

DECODE_BATCH = 64  # pictures


@dataclass(frozen=True)
class CachedBatch:
    """The cached features of a batch."""

    cache: Cache
    entries: Sequence[Entry]
    which: Sequence[int]
    """Index of the caption of each example."""
    size: int
    """Picture size in pixels."""

    def moments(self) -> Posterior:
        """Posterior over raw latents (B, *latent), in the storage type."""
        return self.cache.moments(self.entries, self.size)

    def text(self) -> tuple[Tensor, Tensor]:
        """Token features (B, N, D) and mask (B, N) bool."""
        return self.cache.text(self.entries, self.which)

    def pooled(self) -> Tensor:
        """One vector per caption (B, D)."""
        return self.cache.pooled(self.entries, self.which)

    def pixels(self) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1]."""
        return self.cache.pixels(self.entries, self.size)

    def tower(self) -> Tensor:
        """Embeddings (B, D) of the frozen image tower."""
        return self.cache.fixed(self.entries, f"tower_{self.size}")


def cached_batch(examples: Sequence[Any], size: int) -> CachedBatch | None:
    """The cached features of examples; None when they do not come from a cache."""
    if "entry" not in examples[0]:
        return None
    entries = [example["entry"] for example in examples]
    which = [example["which"] for example in examples]
    entries[0].cache.fetch(entries, which, size)
    return CachedBatch(entries[0].cache, entries, which, size)


def cache_of(reader: Reader) -> Cache | None:
    """The cache behind a reader; None for other data."""
    return getattr(reader, "cache", None) if "features" in reader.fields else None


def pixel_pictures(cache: Cache, entries: Sequence[Entry], size: int, factor: int) -> Iterator[Tensor]:
    """Pictures (B, 3, S, S) from the moments of a pixel codec, which are the pixels themselves."""
    codec: Codec = build_codec("pixel", factor=factor)
    for start in range(0, len(entries), DECODE_BATCH):
        yield codec.decode(cache.moments(entries[start : start + DECODE_BATCH], size).mean.float())
