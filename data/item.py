"""One example of a data set, and its record before any file is read.

H height, W width of an image in pixels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from crossflow.data.scenes import Scene

FIELDS = ("image", "captions", "depth", "scene", "features", "released")


@dataclass(frozen=True, eq=False)
class Item:
    """One example; fields that a format lacks are empty.

    >>> item = Item("000001", np.zeros((4, 6, 3), np.uint8), ("a red cube", "a cube"))
    >>> item.image.shape, len(item.captions), item.depth
    ((4, 6, 3), 2, None)
    """

    id: str
    image: np.ndarray | None = None
    """uint8 (H, W, 3) RGB."""
    captions: tuple[str, ...] = ()
    depth: np.ndarray | None = None
    """float32 (H, W) in metres, 0 where nothing was measured."""
    scene: "Scene | None" = None
    features: Any = None
    """Precomputed features: the `Entry` of a cache, or the arrays of a released feature file by name."""
    grey: bool = False
    """Whether the file stores a single channel, which `image` repeats three times."""


class BadItem(Exception):
    """Item `id` is unusable, for `reason`."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Record:
    """One item before its files are read. File names are relative to the reader's root.

    A non-empty `problem` says why the item is known to be bad.
    """

    id: str
    image: str = ""
    captions: tuple[str, ...] = ()
    depth: str = ""
    problem: str = ""
