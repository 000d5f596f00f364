"""Training examples of the tasks that pair a picture with words: a square picture and one of its captions."""

from typing import Any

import numpy as np

from crossflow.data.images import to_tensor
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize


def captioned_example(
    item: Item,
    size: int,
    generator: np.random.Generator,
    *,
    first_caption: float = 0.0,
    caption: int | None = None,
) -> dict[str, Any]:
    """One training example; every random choice comes from `generator`.

    Args:
        item: with captions, and either an image or the features of a cache.
        size: side of the square picture in pixels.
        generator: keyed by (seed, epoch, index), so that each epoch draws another caption.
        first_caption: probability in [0, 1] of taking the first caption before drawing one from all.
        caption: index of the caption to take instead of a random one; beyond the end it means the last.

    Returns:
        "id", "caption", "which" (its index), "seed" (of the latent's sample, in [0, 2^62)), and "image", float32
        (3, size, size) in [-1, 1]; for an item of a cache "entry" (where its features lie) instead of "image".
    """
    which = 0
    if len(item.captions) > 1 and not (first_caption and generator.random() < first_caption):
        which = int(generator.integers(len(item.captions)))
    if caption is not None:  # after the draw, so that the seed does not depend on this setting
        which = min(caption, len(item.captions) - 1)
    example: dict[str, Any] = {
        "id": item.id,
        "caption": item.captions[which],
        "which": which,
        "seed": int(generator.integers(2**62)),
    }
    if item.image is None:
        return example | {"entry": item.features}
    return example | {"image": to_tensor(center_crop_resize(item.image, size))}
