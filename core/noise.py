"""Keyed randomness: each random number is a function of its key, independent of batch size, order and process count.

In training the key is (seed, step, global sample index), in sampling (seed, item id). The numbers are the bits of
Philox (Salmon et al. 2011) under a 128-bit digest of the key, so that no two keys share their noise. So does the order
of the items in an epoch: key (seed, epoch). B batch.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from crossflow.core.batch import map_tensors


def _digest(num_bytes: int, parts: tuple[int | str, ...]) -> int:
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=num_bytes).digest(), "little")


def key(*parts: int | str) -> int:
    """A 63-bit integer that is a function of `parts` alone, the same on every machine."""
    return _digest(8, parts) >> 1


def keyed_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `key(*parts)`, of which torch uses 32 bits.

    Use it for a few streams, such as initial weights; among 100,000 keys, two are likely to share a stream.
    """
    return torch.Generator().manual_seed(key(*parts))


def _random_bits(keys: Sequence[tuple[int | str, ...]], num: int) -> Tensor:
    """Random integers in [0, 2^24), exact in float32: (len(keys), num) int32; each row is a function of its key."""
    words = np.empty((len(keys), (num + 1) // 2), np.uint64)
    for row, parts in enumerate(keys):
        words[row] = np.random.Philox(key=_digest(16, parts)).random_raw(words.shape[1])
    return torch.from_numpy(words.view(np.int32))[:, :num] & 0xFFFFFF


def _normal(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) from `_random_bits` (B, 2 ceil(values / 2)), by the transform of Box and Muller."""
    # Half a step away from 0, whose logarithm is infinite.
    uniform = bits.float().add_(0.5).mul_(2**-24)
    radius, angle = uniform[:, ::2].log().mul_(-2).sqrt_(), uniform[:, 1::2] * (2 * math.pi)
    values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return values[:, : math.prod(shape)].reshape(len(bits), *shape)


NUM_JUMP = 5
"""Uniform numbers of a sample for the jumps of a flow map."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of a training batch.

    Attributes:
        source: (B, *latent) standard normal, eps of the source posterior.
        time: (B,) uniform in [0, 1), mapped to t by the time law.
        drop: (B,) uniform in [0, 1), by which the indicator is drawn.
        jump: (B, NUM_JUMP) uniform in [0, 1), by which jumps of a flow map are drawn; see `core.interval.draw_jumps`.
    """

    source: Tensor
    time: Tensor
    drop: Tensor
    jump: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Noise":
        """All parts on `device`."""
        return map_tensors(lambda part: part.to(device, non_blocking=non_blocking), self)

    def __getitem__(self, rows: slice | Tensor) -> "Noise":
        """The numbers of some samples."""
        return map_tensors(lambda part: part[rows], self)


def training_noise(seed: int, step: int, samples: Sequence[int], latent_shape: Sequence[int]) -> Noise:
    """The noise of the samples with the global indices `samples` at optimizer step `step`; float32 on the CPU.

    >>> whole, part = training_noise(0, 7, range(10), (4, 32, 32)), training_noise(0, 7, [8], (4, 32, 32))
    >>> torch.equal(part.source[0], whole.source[8])
    True
    """
    end = 2 + _num_bits(latent_shape)
    bits = _random_bits([("train", seed, step, sample) for sample in samples], end + NUM_JUMP)
    uniform, jump = (part.float() * 2**-24 for part in (bits[:, :2], bits[:, end:]))
    return Noise(_normal(bits[:, 2:end], latent_shape), uniform[:, 0].clone(), uniform[:, 1].clone(), jump)


def item_noise(seed: int, ids: Sequence[str], latent_shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *latent), float32 on the CPU; row i is a function of (seed, ids[i]) alone, so an item can be
    generated again without the others.
    """
    bits = _random_bits([("item", seed, name) for name in ids], _num_bits(latent_shape))
    return _normal(bits, latent_shape)


def _num_bits(shape: Sequence[int]) -> int:
    """How many random integers `_normal` takes: the number of values, rounded up to an even one."""
    return math.prod(shape) + math.prod(shape) % 2


# -- the order of an epoch


class Order(Protocol):
    """A permutation of range(n): `order[places]` are the indices at these places, both int64 (B,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray) -> np.ndarray: ...

    def place_of(self, index: int) -> int:
        """The place at which `index` stands."""


# Permutations of up to 2^21 items are sorted random numbers, 16 MB at most, as every run of such a size has had them.
LARGEST_SORTED = 2**21


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> Order:
    """The permutation of range(n) for an epoch of training, the same everywhere.

    >>> order(0, 0, 10)[np.arange(3)], order(0, 0, 10**12)[np.arange(3)]
    (array([6, 5, 0]), array([668583343550, 398654952276, 938428821954]))
    """
    if n <= LARGEST_SORTED:
        # Raw bits are sorted because those of Philox never change between versions, unlike numpy's shuffling.
        bits = np.random.Philox(key=key("order", seed, epoch)).random_raw(n)
        return SortedOrder(np.argsort(bits, kind="stable"))
    return KeyedOrder(n, "order", seed, epoch)


class SortedOrder:
    """An order that is held in memory: int64 (n,)."""

    def __init__(self, permutation: np.ndarray) -> None:
        self.permutation = permutation

    def __len__(self) -> int:
        return len(self.permutation)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self.permutation[places]

    def place_of(self, index: int) -> int:
        """The place at which `index` stands."""
        return int(np.flatnonzero(self.permutation == index)[0])


class KeyedOrder:
    """An order of `num_items` items that is computed where it is read: a function of `parts`, without memory.

    A Feistel network permutes the numbers of as many bits as `num_items` needs; a result outside of the range is
    permuted again until it lies inside (cycle walking, Black and Rogaway 2002), twice on average at most.
    """

    NUM_ROUNDS = 8

    def __init__(self, num_items: int, *parts: int | str) -> None:
        assert 0 < num_items < 2**62
        self.num_items = num_items
        num_bits = max(2, (num_items - 1).bit_length())
        self._low = np.uint64(num_bits // 2)  # bits of the right half; the left half has the others
        self._masks = [np.uint64(2**half - 1) for half in (num_bits - num_bits // 2, num_bits // 2)]
        self._keys = [np.uint64(_digest(8, (*parts, number))) for number in range(self.NUM_ROUNDS)]

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._walk(places, range(self.NUM_ROUNDS))

    def place_of(self, index: int) -> int:
        """The place at which `index` stands."""
        return int(self._walk(np.array([index]), range(self.NUM_ROUNDS - 1, -1, -1))[0])

    def _walk(self, numbers: np.ndarray, rounds: range) -> np.ndarray:
        """The network with its rounds in this order, repeated for the numbers that it leads out of the range."""
        result = self._permute(numbers.astype(np.uint64), rounds)
        while (outside := np.flatnonzero(result >= self.num_items)).size:
            result[outside] = self._permute(result[outside], rounds)
        return result.astype(np.int64)

    def _permute(self, numbers: np.ndarray, rounds: range) -> np.ndarray:
        halves = [numbers >> self._low, numbers & self._masks[1]]
        for number in rounds:
            changed = number % 2
            halves[changed] = halves[changed] ^ (_mixed(halves[1 - changed], self._keys[number]) & self._masks[changed])
        return halves[0] << self._low | halves[1]


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 (B,) that depend on every bit of uint64 `values` (B,) and `key`; the constants are those of rrmxmx."""
    values = (values ^ key) * np.uint64(0x9FB21C651E98DF25)
    values ^= values >> np.uint64(28)
    values *= np.uint64(0x9FB21C651E98DF25)
    return values ^ values >> np.uint64(28)
