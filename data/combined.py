"""Several outputs for one input as a single one with its uncertainty. H W height and width of the output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.files import write_array
from crossflow.data.images import save_png
from crossflow.data.sheet import colour_spread

Combination = Callable[[Sequence[Any]], "Combined"]
"""Several outputs for one input -> a single one with its uncertainty."""


@dataclass(frozen=True)
class Combined:
    """What the members of an ensemble agree on, and how far they lie apart at each pixel.

    Attributes:
        value: an output of the task.
        uncertainty: float32 (H, W), in `unit`.
        unit: in words.
    """

    value: Any
    uncertainty: np.ndarray
    unit: str

    def write(self, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes the uncertainty as STEM_uncertainty.npy and in colours, blue 0 and red the largest; returns both."""
        about = {**metadata, "unit": self.unit, "red": f"{self.uncertainty.max():.4g}"}
        return [
            write_array(stem.with_name(f"{stem.name}_uncertainty.npy"), self.uncertainty),
            save_png(colour_spread(self.uncertainty), stem.with_name(f"{stem.name}_uncertainty.png"), about),
        ]


def combined_pictures(pictures: Sequence[np.ndarray]) -> Combined:
    """Pictures uint8 (H, W, 3): their mean, and the deviation of the grey values from it, averaged over channels.

    >>> combined_pictures([np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 4, np.uint8)]).uncertainty
    array([[2.]], dtype=float32)
    """
    stack = np.stack(pictures).astype(np.float32)
    mean = np.rint(stack.mean(0)).astype(np.uint8)
    return Combined(mean, stack.std(0).mean(-1).astype(np.float32), "grey values of 255")


def combined_depth(maps: Sequence[np.ndarray]) -> Combined:
    """Depth maps (H, W) in metres: their median at each pixel, and half of the distance from the 16 % to the 84 %
    quantile as a share of it, which is the deviation where errors are normal.
    """
    low, middle, high = np.quantile(np.stack(maps).astype(np.float64), (0.16, 0.5, 0.84), axis=0)
    return Combined(middle.astype(np.float32), ((high - low) / 2 / middle).astype(np.float32), "share of the depth")
