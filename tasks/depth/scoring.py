"""How depth estimation is scored: on centre squares at the model's size (a run's own rules), or on whole pictures by
the rules of a protocol.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from crossflow.core.config import Section
from crossflow.data.cases import Case, Tile
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.data.sheet import colour_depth
from crossflow.tasks.base import Scoring
from crossflow.tasks.depth.config import DepthConfig
from crossflow.tasks.depth.dataset import square
from crossflow.tasks.depth.metric import DepthMetric, measured

KITTI_HEIGHT, KITTI_WIDTH = 352, 1216
NUM_FOR_MEDIAN = 1000
"""Training items whose median is the trivial baseline."""


class DepthRules(Section):
    """What a protocol may fix for depth estimation."""

    alignment: Literal["none", "median", "affine"] = "none"
    """none: metric depth; median: one factor; affine: scale and shift of least squares, one pair per picture."""
    space: Literal["depth", "disparity"] = "depth"
    """Where scale and shift are fitted and applied."""
    min_depth: float = Field(1e-3, gt=0)
    """Metres; pixels measured at or below it do not count."""
    max_depth: float | None = None
    """Metres; pixels measured at or above it do not count, and predictions are clipped to it."""
    crop: Literal["none", "eigen", "garg", "nyu"] = "none"
    """The part of a whole picture that is scored."""
    picture: Literal["whole", "kitti", "square"] = "whole"
    """What the model sees: the whole picture, the 352 x 1216 pixels at the bottom centre (KITTI's benchmark), or the
    centre square at the model's size.
    """


class DepthScoring(Scoring[DepthConfig, DepthRules]):
    """The errors of the KITTI and NYU tables, beside the per-pixel median of the training depth."""

    Rules = DepthRules
    Metric = DepthMetric
    headline = ("abs_rel", "rmse", "delta1")

    def own_rules(self) -> DepthRules:
        """Centre squares at the model's size, by the section `depth` of the configuration."""
        settings = self.config.depth
        return DepthRules(
            alignment=settings.alignment,
            min_depth=settings.near,
            max_depth=settings.far,
            crop=settings.crop,
            picture="square",
        )

    @property
    def options(self) -> Mapping[str, str]:
        """No crop by the reader, where these rules have one."""
        # The crop of these rules is taken on the whole picture; the reader's own would be a second one.
        return {"crop": "none"} if not self.by_protocol and self.rules.crop != "none" else {}

    @property
    def resize(self) -> str:
        """In words, what the model sees."""
        if self.rules.picture == "square":
            return super().resize
        return f"whole picture, shorter side to {self.config.data.image_size} px, the estimate resized back bilinearly"

    def case(self, item: Item) -> Case:
        """The picture uint8 (H, W, 3) and its depth float32 (H, W) in metres, 0 where it does not count."""
        assert item.image is not None
        assert item.depth is not None
        image, depth, rules = item.image, item.depth, self.rules
        if rules.picture == "kitti":
            image, depth = (bottom_centre(array, KITTI_HEIGHT, KITTI_WIDTH) for array in (image, depth))
        if rules.picture == "square":
            side = self.config.data.image_size
            inside = measured(
                depth, rules.min_depth, np.inf if rules.max_depth is None else rules.max_depth, rules.crop
            )
            depth = center_crop_resize(np.where(inside, depth, 0).astype(np.float32), side, resample="nearest")
            image = center_crop_resize(image, side)
        return Case(item.id, image, depth, item)

    def metric(self, *, thorough: bool = False) -> DepthMetric:
        """The metric under these rules."""
        rules = self.rules
        return DepthMetric(
            rules.alignment,
            space=rules.space,
            min_depth=rules.min_depth,
            max_depth=rules.max_depth,
            crop="none" if rules.picture == "square" else rules.crop,  # of a square: taken by `case`
        )

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any] | None:
        """The per-pixel median of the training depth maps, the same for every picture; none for whole pictures, which
        differ in size.
        """
        if self.rules.picture != "square":
            return None
        near, far = self.config.depth.near, self.config.depth.far
        depths = [square(item, self.config.data.image_size)[1] for item in open_train().items(NUM_FOR_MEDIAN)]
        stack = np.stack([np.where((depth >= near) & (depth <= far), depth, np.nan) for depth in depths])
        everywhere = np.nanmedian(stack)
        missing = np.isnan(stack).all(axis=0)
        median = np.where(missing, everywhere, np.nanmedian(np.where(missing, everywhere, stack), axis=0))
        estimate = median.astype(np.float32)
        return lambda case: estimate

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        """The picture, the estimate and the truth, in colours of one scale."""
        valid = case.truth[case.truth > 0]
        near, far = (float(valid.min()), float(valid.max())) if len(valid) else (None, None)
        return [
            Tile(case.input, "picture"),
            Tile(colour_depth(output, near=near, far=far), "estimate"),
            Tile(colour_depth(case.truth, near=near, far=far), "truth"),
        ]


def bottom_centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The `height` x `width` pixels at the bottom, in the middle; what is smaller stays as it is."""
    top, left = max(0, array.shape[0] - height), max(0, array.shape[1] - width) // 2
    return array[top:, left : left + width]
