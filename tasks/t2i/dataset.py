"""Training examples of text-to-image: a square picture and one of its captions, drawn anew each epoch."""

from typing import Any

import numpy as np

from crossflow.data.images import center_crop_resize, to_tensor
from crossflow.data.readers import Item


def example(item: Item, size: int, generator: np.random.Generator, first_caption: float = 0.0) -> dict[str, Any]:
    """{"id", "image" float32 (3, size, size) in [-1, 1], "caption", "which" of them, "seed" of its latent's sample};
    all chance from `generator`. An item of a cache gives "entry", where its features lie, instead of "image".
    first_caption: the chance that the first caption is taken before one is drawn from all.
    """
    which = 0
    if len(item.captions) > 1 and not (first_caption and generator.random() < first_caption):
        which = int(generator.integers(len(item.captions)))
    one = {"id": item.id, "caption": item.captions[which], "which": which, "seed": int(generator.integers(2**62))}
    if item.image is None:
        return one | {"entry": item.features}
    return one | {"image": to_tensor(center_crop_resize(item.image, size))}
