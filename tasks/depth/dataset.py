"""Training examples of depth estimation: a square picture and its depth, cropped and flipped alike. H W =
image_size.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from crossflow.core.config import Section
from crossflow.data.images import to_tensor
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize


class Augmentation(Section):
    """How training squares are cut and changed."""

    flip: bool = True
    """Mirror half of the training pictures."""
    crop: float = Field(1.0, gt=0, le=1)
    """Smallest side of a random square crop, as a share of the shorter side; 1: squares as high or wide as the picture.
    """
    position: Literal["centre", "random"] = "centre"
    """Where a square of full side lies along the longer side: in the middle, or anywhere, so that every part of the
    picture is trained on. Smaller crops lie anywhere.
    """
    colour: float = Field(0.0, ge=0, lt=1)
    """Brightness, contrast and saturation of the training pictures are each multiplied by 1 - colour to 1 + colour."""


def square(item: Item, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The centre crop of an item at the model's size: uint8 (size, size, 3), float32 (size, size) metres (nearest, 0
    = missing).
    """
    assert item.image is not None
    assert item.depth is not None
    return center_crop_resize(item.image, size), center_crop_resize(item.depth, size, resample="nearest")


def example(item: Item, size: int, augmentation: Augmentation, generator: np.random.Generator) -> dict[str, Any]:
    """{"id", "source" float32 (3, H, W) in [-1, 1], "target" float32 (1, H, W) metres, "colour" (3,) factors for
    `coloured`}; every random choice comes from `generator`.
    """
    assert item.image is not None
    assert item.depth is not None
    image, depth = item.image, item.depth
    if augmentation.crop < 1 or augmentation.position == "random":
        shorter = min(image.shape[:2])
        side = max(1, round(shorter * generator.uniform(augmentation.crop, 1)))
        top, left = (int(generator.integers(0, length - side + 1)) for length in image.shape[:2])
        image, depth = image[top : top + side, left : left + side], depth[top : top + side, left : left + side]
    image, depth = center_crop_resize(image, size), center_crop_resize(depth, size, resample="nearest")
    if augmentation.flip and generator.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    span = augmentation.colour
    return _tensors(item.id, image, depth, generator.uniform(1 - span, 1 + span, 3) if span else np.ones(3))


def plain(item: Item, size: int) -> dict[str, Any]:
    """The example of an item without augmentation: its centre square."""
    return _tensors(item.id, *square(item, size), np.ones(3))


def _tensors(id: str, image: np.ndarray, depth: np.ndarray, factors: np.ndarray) -> dict[str, Any]:
    return {
        "id": id,
        "colour": torch.from_numpy(factors.astype(np.float32)),
        "source": to_tensor(np.ascontiguousarray(image)),
        "target": torch.from_numpy(np.ascontiguousarray(depth, dtype=np.float32))[None],
    }


def coloured(rgb: Tensor, factors: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with brightness, contrast and saturation multiplied by factors (B, 3)."""
    if (factors == 1).all():
        return rgb
    from kornia import enhance

    brightness, contrast, saturation = factors.unbind(1)
    pixels = enhance.adjust_brightness_accumulative((rgb + 1) / 2, brightness)
    pixels = enhance.adjust_contrast_with_mean_subtraction(pixels, contrast)
    return enhance.adjust_saturation_with_gray_subtraction(pixels, saturation) * 2 - 1
