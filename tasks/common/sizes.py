"""Pictures of any size through a model of patches: grouping by shape, fitting sides, overlapped and blended tiles."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image


def by_shape(
    inputs: Sequence[np.ndarray], ids: Sequence[str], run: Callable[[list[np.ndarray], list[str]], list[Any]]
) -> list[Any]:
    """`run` on groups of inputs of equal shape, the outputs in the order of the inputs."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, value in enumerate(inputs):
        groups.setdefault(value.shape, []).append(index)
    outputs: list[Any] = [None] * len(inputs)
    for indices in groups.values():
        results = run([inputs[i] for i in indices], [ids[i] for i in indices])
        for index, output in zip(indices, results, strict=True):
            outputs[index] = output
    return outputs


def fit_shorter_side(image: np.ndarray, size: int, multiple: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 resized so that its shorter side is `size`, both sides rounded to multiples of
    `multiple`.

    `size` itself must be such a multiple. A side is at most 4 x `size`: longer pictures are squeezed.
    """
    height, width = image.shape[:2]
    factor = size / min(height, width)
    sides = [min(max(size, round(side * factor / multiple) * multiple), 4 * size) for side in (height, width)]
    if (height, width) == tuple(sides):
        return image
    return np.array(Image.fromarray(image).resize((sides[1], sides[0]), Image.Resampling.BICUBIC))


def tile_starts(length: int, tile: int, overlap: int, align: int = 1) -> list[int]:
    """Where tiles of `tile` pixels start so that they cover `length` >= tile and neighbours share >= `overlap` pixels.

    Every start is a multiple of `align`, as length and tile are.
    """
    step = max(align, (tile - overlap) // align * align)
    return [*range(0, length - tile, step), length - tile]


def blend_window(tile: int, overlap: int) -> np.ndarray:
    """(tile, tile) weights that fall towards the borders over `overlap` pixels and are nowhere zero."""
    ramp = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).clip(max=max(overlap, 1)) / max(overlap, 1)
    return np.outer(ramp, ramp).astype(np.float32)


def cut(image: np.ndarray, tile: int, overlap: int, align: int = 1) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Tiles (tile, tile, C) of an image (H, W, C) with H, W >= tile, and where each starts: see `tile_starts`."""
    rows, columns = (tile_starts(length, tile, overlap, align) for length in image.shape[:2])
    starts = [(row, column) for row in rows for column in columns]
    return [image[row : row + tile, column : column + tile] for row, column in starts], starts


def join(
    tiles: Sequence[np.ndarray], starts: Sequence[tuple[int, int]], shape: tuple[int, ...], tile: int, overlap: int
) -> np.ndarray:
    """The image (H, W, C) float32 of overlapping tiles, weighted by `blend_window`."""
    total = np.zeros(shape, np.float32)
    weights = np.zeros((*shape[:2], 1), np.float32)
    window = blend_window(tile, overlap)[..., None]
    for piece, (row, column) in zip(tiles, starts, strict=True):
        total[row : row + tile, column : column + tile] += window * piece
        weights[row : row + tile, column : column + tile] += window
    return total / weights
