"""Super-resolution pairs: a picture and its antialiased bicubic reduction (MATLAB's imresize, as in all published
tables).

A scale is p / q in lowest terms: p pixels of the high resolution are q of the low one (q = 1 for whole numbers).
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from crossflow.data.images import to_tensor
from crossflow.data.item import Item
from crossflow.data.resize import imresize_matlab


def to_multiple(image: np.ndarray, scale: Fraction | int) -> np.ndarray:
    """The picture (H, W, 3) cut at the bottom and right to multiples of p (the standard crop of Set5, B100, ...)."""
    p = Fraction(scale).numerator
    height, width = (side - side % p for side in image.shape[:2])
    return image[:height, :width]


def reduce(image: np.ndarray, scale: Fraction | int) -> np.ndarray:
    """uint8 (H, W, 3), sides multiples of p -> uint8 (H / scale, W / scale, 3)."""
    return imresize_matlab(image, 1 / Fraction(scale))


def enlarge(image: np.ndarray, scale: Fraction | int) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (h scale, w scale, 3), rounded up: the bicubic baseline, and the source of the flow."""
    return imresize_matlab(image, Fraction(scale))


def random_pair(
    image: np.ndarray, size: int, scale: Fraction | int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random `size` x `size` crop of a picture, flipped and turned, and its bicubic version; both uint8 (size, size,
    3).

    The crop is reduced together with a margin of its surroundings, so that its border looks as inside a picture. A
    picture that is too small is first continued by its mirror image.
    """
    missing = [max(0, size - side) for side in image.shape[:2]]
    if any(missing):
        image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    p, q = Fraction(scale).as_integer_ratio()
    margin = p * math.ceil(3 / q)  # three pixels of the low resolution, or a little more
    top, left = (p * int(generator.integers(0, (side - size) // p + 1)) for side in image.shape[:2])
    up, before = min(margin, top), min(margin, left)
    window = to_multiple(image[top - up : top + size + margin, left - before : left + size + margin], scale)
    bicubic = enlarge(reduce(window, scale), scale)
    inside = (slice(up, up + size), slice(before, before + size))
    sharp, blurred = window[inside], bicubic[inside]
    turns, flip = int(generator.integers(4)), generator.random() < 0.5
    pair = [np.rot90(picture, turns)[:, :: -1 if flip else 1] for picture in (sharp, blurred)]
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def example(item: Item, size: int, scale: Fraction | int, generator: np.random.Generator) -> dict[str, Any]:
    """{"id", "sharp", "bicubic"}: float32 (3, size, size) in [-1, 1]."""
    assert item.image is not None
    sharp, bicubic = random_pair(item.image, size, scale, generator)
    return {"id": item.id, "sharp": to_tensor(sharp), "bicubic": to_tensor(bicubic)}
