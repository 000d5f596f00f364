"""Keyed randomness: every random number follows from a key, so results depend on no batch size, order or process count.

In training the key is (seed, step, global sample index), in sampling (seed, item id). B batch.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit integer that follows from `parts` alone, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


@dataclass(frozen=True)
class Noise:
    """The random numbers of one training batch.

    `source` (B, *latent) standard normal; `time` (B,) uniform in [0, 1); `drop` (B,) uniform in [0, 1), by which the
    indicator is drawn.
    """

    source: Tensor
    time: Tensor
    drop: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Noise":
        return Noise(*(part.to(device, non_blocking=non_blocking) for part in (self.source, self.time, self.drop)))


def training_noise(seed: int, step: int, samples: Sequence[int], latent_shape: Sequence[int]) -> Noise:
    """The noise of the samples with the global indices `samples` at optimizer step `step`; float32 on CPU."""
    source = torch.empty(len(samples), *latent_shape)
    uniform = torch.empty(len(samples), 2)
    for row, sample in enumerate(samples):
        generator = keyed_generator("train", seed, step, sample)
        uniform[row].uniform_(generator=generator)
        source[row].normal_(generator=generator)
    return Noise(source, uniform[:, 0].clone(), uniform[:, 1].clone())


def item_noise(seed: int, ids: Sequence[str], latent_shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *latent); row i depends on (seed, ids[i]) only, so one item can be generated again alone."""
    return torch.stack([torch.randn(*latent_shape, generator=keyed_generator("item", seed, name)) for name in ids])


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of range(n) for an epoch of training: int64 (n,), not writable, the same everywhere."""
    # Sorting raw bits: the bits of Philox are fixed for good, numpy's shuffling is not.
    permutation = np.argsort(np.random.Philox(key=key("order", seed, epoch)).random_raw(n), kind="stable")
    permutation.flags.writeable = False
    return permutation
