"""Keyed randomness: each random number is a function of its key, independent of batch size, order and process count.

In training the key is (seed, step, global sample index), in sampling (seed, item id). The numbers are the bits of
Philox (Salmon et al. 2011) under a 128-bit digest of the key, so that no two keys share their noise. B batch.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Noise:
    """The random numbers of a training batch.

    Attributes:
        source: (B, *latent) standard normal, eps of the source posterior.
        time: (B,) uniform in [0, 1), mapped to t by the time law.
        drop: (B,) uniform in [0, 1), by which the indicator is drawn.
    """

    source: Tensor
    time: Tensor
    drop: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Noise":
        """All parts on `device`."""
        return Noise(*(part.to(device, non_blocking=non_blocking) for part in (self.source, self.time, self.drop)))


def training_noise(seed: int, step: int, samples: Sequence[int], latent_shape: Sequence[int]) -> Noise:
    """The noise of the samples with the global indices `samples` at optimizer step `step`; float32 on the CPU.

    >>> whole, part = training_noise(0, 7, range(10), (4, 32, 32)), training_noise(0, 7, [8], (4, 32, 32))
    >>> torch.equal(part.source[0], whole.source[8])
    True
    """
    bits = _random_bits([("train", seed, step, sample) for sample in samples], 2 + _num_bits(latent_shape))
    uniform = bits[:, :2].float() * 2**-24
    return Noise(_normal(bits[:, 2:], latent_shape), uniform[:, 0].clone(), uniform[:, 1].clone())


def item_noise(seed: int, ids: Sequence[str], latent_shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *latent), float32 on the CPU; row i is a function of (seed, ids[i]) alone, so an item can be
    generated again without the others.
    """
    bits = _random_bits([("item", seed, name) for name in ids], _num_bits(latent_shape))
    return _normal(bits, latent_shape)


def _num_bits(shape: Sequence[int]) -> int:
    """How many random integers `_normal` takes: the number of values, rounded up to an even one."""
    return math.prod(shape) + math.prod(shape) % 2


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of range(n) for an epoch of training: int64 (n,), not writable, the same everywhere."""
    # Raw bits are sorted because those of Philox never change between versions, unlike numpy's shuffling.
    permutation = np.argsort(np.random.Philox(key=key("order", seed, epoch)).random_raw(n), kind="stable")
    permutation.flags.writeable = False
    return permutation
