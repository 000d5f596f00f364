"""Pictures of any size for models with patches: fitting sides, and overlapping, blended tiles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


def fit_shorter_side(image: np.ndarray, size: int, multiple: int) -> np.ndarray:
    """The picture uint8 (H, W, 3) resized to a shorter side of `size`, both sides rounded to multiples of `multiple`.

    `size` must be such a multiple. The longer side is at most 4 x `size`: longer pictures are squeezed.
    """
    return resize_image(image, fitted_sides(image.shape, size, multiple))


def resize_image(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3) uint8 at the height and width of `shape`, by bicubic interpolation."""
    if image.shape[:2] == shape:
        return image
    return np.array(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def fitted_sides(shape: tuple[int, ...], size: int, multiple: int) -> tuple[int, int]:
    """Height and width after `fit_shorter_side` of a picture of `shape` (H, W, ...)."""
    factor = size / min(shape[:2])
    height, width = (min(max(size, round(side * factor / multiple) * multiple), 4 * size) for side in shape[:2])
    return height, width


def tile_starts(length: int, tile: int, overlap: int, align: int = 1) -> list[int]:
    """Starts of tiles of `tile` pixels that cover `length` >= tile, neighbours sharing at least `overlap` pixels.

    Every start is a multiple of `align`, provided that `length` and `tile` are.

    >>> tile_starts(40, 16, 4)
    [0, 12, 24]
    """
    step = max(align, (tile - overlap) // align * align)
    return [*range(0, length - tile, step), length - tile]


def blend_window(tile: int, overlap: int) -> np.ndarray:
    """Weights float32 (tile, tile) that fall towards the borders over `overlap` pixels and are always positive."""
    ramp = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).clip(max=max(overlap, 1)) / max(overlap, 1)
    return np.outer(ramp, ramp).astype(np.float32)


def cut(image: np.ndarray, tile: int, overlap: int, align: int = 1) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Tiles (tile, tile, C) of an image (H, W, C) with H, W >= tile, and the start (row, column) of each."""
    rows, columns = (tile_starts(length, tile, overlap, align) for length in image.shape[:2])
    starts = [(row, column) for row in rows for column in columns]
    return [image[row : row + tile, column : column + tile] for row, column in starts], starts


@dataclass(frozen=True)
class Tiles:
    """A picture cut into overlapping tiles, which `join` puts together again.

    >>> image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    >>> tiles = Tiles.of(image, tile=16, overlap=4, multiple=4)
    >>> bool((tiles.join(tiles.pieces) == image).all())
    True
    """

    pieces: list[np.ndarray]
    """uint8 (tile, tile, 3) each."""
    starts: list[tuple[int, int]]
    """Row and column of each tile in the padded picture."""
    shape: tuple[int, int]
    """Height and width of the picture."""
    padded: tuple[int, ...]
    """Shape of the padded picture."""
    tile: int
    overlap: int

    @classmethod
    def of(cls, image: np.ndarray, tile: int, overlap: int, multiple: int) -> "Tiles":
        """Tiles of a picture uint8 (H, W, 3) that start at multiples of `multiple`, of which `tile` is one.

        Sides that are not multiples are padded by reflection; a picture smaller than a tile is a single smaller tile.
        """
        height, width = image.shape[:2]
        sides = [length + -length % multiple for length in (height, width)]
        side = min(tile, max(sides))
        pad = [(0, max(side, padded) - length) for padded, length in zip(sides, (height, width), strict=True)]
        padded = np.pad(image, (*pad, (0, 0)), mode="symmetric")
        pieces, starts = cut(padded, side, overlap, multiple)
        return cls(pieces, starts, (height, width), padded.shape, side, overlap)

    def join(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The picture uint8 (H, W, 3) of one uint8 output for each tile, blended where tiles overlap."""
        height, width = self.shape
        joined = join(outputs, self.starts, self.padded, self.tile, self.overlap)
        return np.rint(joined[:height, :width]).clip(0, 255).astype(np.uint8)


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
