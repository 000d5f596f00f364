"""Super-resolution pairs: a picture and its antialiased bicubic reduction (MATLAB's imresize, as in all published
tables).

A scale is p / q in lowest terms: p pixels of the high resolution are q of the low one (q = 1 for whole numbers).
"""

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from crossflow.core.config import Section
from crossflow.data.images import to_tensor
from crossflow.data.item import BadItem, Item
from crossflow.data.resize import center_crop_resize, imresize_matlab


class Augmentation(Section):
    """How training squares are cut and changed."""

    crop: Literal["random", "centre"] = "random"
    """random: squares of the pictures' own pixels, anywhere; centre: the centre square resized to the crop's side."""
    small: Literal["mirror", "skip"] = "mirror"
    """Pictures smaller than the crop: continued by their mirror image, or left out."""
    turn: bool = True
    """Turn training crops by a random multiple of 90 degrees."""
    flip: bool = True
    """Mirror half of the training crops."""


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


def cut_pair(
    image: np.ndarray, size: int, scale: Fraction | int, place: tuple[float, float] = (0.5, 0.5)
) -> tuple[np.ndarray, np.ndarray]:
    """A `size` x `size` square of a picture (H, W, 3) and its bicubic version; both uint8 (size, size, 3).

    place: where the square lies, top and left as shares in [0, 1) of where it can lie. The square is reduced together
    with a margin of its surroundings, so that its border looks as inside a picture. A picture that is too small is
    first continued by its mirror image.
    """
    missing = [max(0, size - side) for side in image.shape[:2]]
    if any(missing):
        image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    p, q = Fraction(scale).as_integer_ratio()
    margin = p * math.ceil(3 / q)  # three pixels of the low resolution, or a little more
    top, left = (p * int(share * ((side - size) // p + 1)) for share, side in zip(place, image.shape[:2], strict=True))
    up, before = min(margin, top), min(margin, left)
    window = to_multiple(image[top - up : top + size + margin, left - before : left + size + margin], scale)
    bicubic = enlarge(reduce(window, scale), scale)
    inside = (slice(up, up + size), slice(before, before + size))
    return window[inside], bicubic[inside]


def pair(
    image: np.ndarray,
    size: int,
    scale: Fraction | int,
    augmentation: Augmentation,
    generator: np.random.Generator | None,
) -> tuple[np.ndarray, np.ndarray]:
    """A square of a picture (H, W, 3) and its bicubic version, both uint8 (size, size, 3).

    generator: of place, turn and mirroring; None: the square at the centre as it is.
    """
    if augmentation.crop == "centre":
        sharp = center_crop_resize(image, size)
        both = (sharp, enlarge(reduce(sharp, scale), scale))
    elif generator is None:
        both = cut_pair(image, size, scale)
    else:
        p = Fraction(scale).numerator
        numbers = [max(0, side - size) // p + 1 for side in image.shape[:2]]
        # The middle of the drawn interval, which no rounding moves to a neighbour.
        top, left = ((int(generator.integers(0, number)) + 0.5) / number for number in numbers)
        both = cut_pair(image, size, scale, (top, left))
    if generator is not None:
        turns = int(generator.integers(4)) if augmentation.turn else 0
        step = -1 if augmentation.flip and generator.random() < 0.5 else 1
        both = (np.rot90(both[0], turns)[:, ::step], np.rot90(both[1], turns)[:, ::step])
    return np.ascontiguousarray(both[0]), np.ascontiguousarray(both[1])


def example(
    item: Item,
    size: int,
    scale: Fraction | int,
    augmentation: Augmentation,
    generator: np.random.Generator | None,
) -> dict[str, Any]:
    """{"id", "target", "source"}: the sharp and the enlarged square, float32 (3, size, size) in [-1, 1]; see `pair`.

    Raises BadItem for a picture that is too small where those are left out.
    """
    assert item.image is not None
    shorter = min(item.image.shape[:2])
    if augmentation.small == "skip" and shorter < size:
        raise BadItem(item.id, f"its shorter side of {shorter} pixels is below the crop's {size}")
    sharp, bicubic = pair(item.image, size, scale, augmentation, generator)
    return {"id": item.id, "target": to_tensor(sharp), "source": to_tensor(bicubic)}
