"""One example of a data set, and the record of it before its files are read.

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
    """One example; what a format lacks is empty.

    `image` uint8 (H, W, 3) RGB; `depth` float32 (H, W) metres, 0 = no measurement.
    """

    id: str
    image: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    depth: np.ndarray | None = None
    scene: "Scene | None" = None
    features: Any = None
    """What was computed from the item before: where it lies in a cache, or the arrays of a released feature file."""


class BadItem(Exception):
    """Item `id` cannot be used, for `reason`."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Record:
    """One item before it is read, its files named relative to the reader's root. `problem`: why it is bad, if known."""

    id: str
    image: str = ""
    captions: tuple[str, ...] = ()
    depth: str = ""
    problem: str = ""
