"""Latents -> pictures, and pictures of any size through overlapped, blended tiles."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from crossflow.tasks.common.codecs import Codec
from crossflow.tasks.common.images import to_uint8
from crossflow.tasks.common.sizes import cut, join


def decode(codec: Codec, z1: Tensor) -> list[np.ndarray]:
    """Latents (B, C, H, W) -> uint8 (H, W, 3) each."""
    return list(to_uint8(codec.decode(z1.cpu())))


def through_tiles(
    image: np.ndarray, tile: int, overlap: int, multiple: int, run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
) -> np.ndarray:
    """`run` over overlapping tiles of a picture uint8 (H, W, 3), blended where they overlap: uint8 (H, W, 3).

    Tiles start at multiples of `multiple` (the patch and the scale), because the source repeats with the pixels of the
    low resolution. Sides that are not such multiples are continued by their mirror image and cut off afterwards.
    """
    height, width = image.shape[:2]
    sides = [length + -length % multiple for length in (height, width)]
    side = min(tile, max(sides))
    pad = [(0, max(side, padded) - length) for padded, length in zip(sides, (height, width), strict=True)]
    padded = np.pad(image, (*pad, (0, 0)), mode="symmetric")
    pieces, starts = cut(padded, side, overlap, multiple)
    joined = join(run(pieces), starts, padded.shape, side, overlap)
    return np.rint(joined[:height, :width]).clip(0, 255).astype(np.uint8)


def pictures(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) each -> float32 (B, 3, H, W) in [-1, 1]."""
    from crossflow.tasks.common.images import to_tensor

    return torch.stack([to_tensor(image) for image in images])
