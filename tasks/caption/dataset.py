"""Training examples of captioning: a square picture and one of its captions, drawn anew each epoch."""

from typing import Any

import numpy as np
from pydantic import Field

from crossflow.core.config import Section
from crossflow.data.readers import Item
from crossflow.tasks.t2i.dataset import example as picture_and_caption


class Captions(Section):
    which: int | None = Field(None, ge=0)
    """Train on this caption of each item (0 = the first, or the last there is) instead of a random one each epoch."""


def example(item: Item, size: int, captions: Captions, generator: np.random.Generator) -> dict[str, Any]:
    """{"id", "image" float32 (3, size, size) in [-1, 1], "caption", "seed"}, as in text-to-image."""
    one = picture_and_caption(item, size, generator)
    if captions.which is not None:
        one["caption"] = item.captions[min(captions.which, len(item.captions) - 1)]
    return one
