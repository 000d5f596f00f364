"""Colourisation: a grey picture -> the same picture in colours, in pixel space. A task of another package."""

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from crossflow.core.config import Config, Section
from crossflow.core.metrics import Row, TaskMetric
from crossflow.data.cases import Case
from crossflow.data.dataset import Examples
from crossflow.data.images import to_tensor
from crossflow.data.item import BadItem, Item
from crossflow.data.resize import center_crop_resize
from crossflow.networks.trunks import PatchTrunk, PatchTrunkSettings
from crossflow.tasks.base import Example, PixelParts, PixelTask, Scoring

LUMA = np.array([0.299, 0.587, 0.114])


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> its luma in all three channels, uint8 (H, W, 3)."""
    return np.repeat(np.rint(image @ LUMA)[..., None], 3, axis=2).astype(np.uint8)


class ColourSettings(Section):
    flip: bool = True
    """Mirror half of the training pictures."""


class ColourConfig(Config):
    colour: ColourSettings = ColourSettings()


class ColourMetric(TaskMetric):
    """colour_error: mean distance of the red-green and yellow-blue values of two pictures, 0 to 255, lower is better;
    saturation: mean spread of the channels of the output, 0 to 255.
    """

    names = ("colour_error", "saturation")

    def score(self, output: np.ndarray, truth: np.ndarray) -> Row:
        a, b = (np.diff(picture.astype(np.float64), axis=2) for picture in (output, truth))
        return {"colour_error": float(np.abs(a - b).mean()), "saturation": float(np.ptp(output, axis=2).mean())}


class ColourRules(Section):
    min_side: int = Field(1, ge=1)
    """Pictures with a shorter side are left out."""


class ColourScoring(Scoring[ColourConfig, ColourRules]):
    """The error of the colours, beside that of the grey picture itself."""

    Rules = ColourRules
    Metric = ColourMetric
    headline = ("colour_error",)

    def case(self, item: Item) -> Case:
        assert item.image is not None
        if min(item.image.shape[:2]) < self.rules.min_side:
            raise BadItem(item.id, "too small to be scored")
        return Case(item.id, grey(item.image), item.image, item)

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any]:
        """The grey picture."""
        return lambda case: case.input


class Adapter(PixelTask[ColourConfig, PixelParts]):
    """Colours for grey pictures of any size."""

    name = "colourisation"
    Config = ColourConfig
    Scoring = ColourScoring
    needs = frozenset({"image"})

    @classmethod
    def transform(cls, config: ColourConfig, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        assert item.image is not None
        image = center_crop_resize(item.image, config.data.image_size)
        if augment and config.colour.flip and generator.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        return {"id": item.id, "source": to_tensor(grey(image)), "target": to_tensor(image)}

    def build_trunk(self) -> nn.Module:
        source = self.config.source
        sizes = PatchTrunkSettings(width=source.width, depth=source.depth, patch=self.config.backbone.patch)
        return PatchTrunk(3, 3, sizes)
