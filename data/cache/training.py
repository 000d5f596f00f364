"""Training from a cache: the features of a batch of examples, gathered. Everything else is as without a cache.

An example of a cached item has "entry" (where its features lie) in place of "image", and "which" of its captions was
drawn. Its latent is drawn from the moments with the example's own seed, keyed by (seed, epoch, index): another one each
epoch, the same one when a run is resumed, and the one that would be drawn without a cache.
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

TOGETHER = 64  # pictures decoded at once


@dataclass(frozen=True)
class CachedBatch:
    """The cached features of a batch: entries of one cache, the captions drawn, the picture size in pixels."""

    cache: Cache
    entries: Sequence[Entry]
    which: Sequence[int]
    size: int

    def moments(self) -> Posterior:
        """Over raw latents (B, *latent), in the type they are stored in."""
        return self.cache.moments(self.entries, self.size)

    def text(self) -> tuple[Tensor, Tensor]:
        """Token features (B, N, D) and mask (B, N) bool."""
        return self.cache.text(self.entries, self.which)

    def pooled(self) -> Tensor:
        """(B, D), one vector per caption."""
        return self.cache.pooled(self.entries, self.which)

    def pixels(self) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1]."""
        return self.cache.pixels(self.entries, self.size)

    def tower(self) -> Tensor:
        """Embeddings (B, D) of the frozen image tower."""
        return self.cache.fixed(self.entries, f"tower_{self.size}")


def cached_batch(examples: Sequence[Any], size: int) -> CachedBatch | None:
    """The cached features of examples; None when they are not from a cache."""
    if "entry" not in examples[0]:
        return None
    entries, which = [one["entry"] for one in examples], [one["which"] for one in examples]
    entries[0].cache.fetch(entries, which, size)
    return CachedBatch(entries[0].cache, entries, which, size)


def cache_of(reader: Reader) -> Cache | None:
    """The cache that a reader reads, if it reads one."""
    return getattr(reader, "cache", None) if "features" in reader.fields else None


def pixel_pictures(cache: Cache, entries: Sequence[Entry], size: int, factor: int) -> Iterator[Tensor]:
    """Pictures (B, 3, S, S) back from the moments of a pixel codec, which are the pixels: to measure its scale on."""
    codec: Codec = build_codec("pixel", factor=factor)
    for start in range(0, len(entries), TOGETHER):
        yield codec.decode(cache.moments(entries[start : start + TOGETHER], size).mean.float())
