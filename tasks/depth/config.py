"""The settings of depth estimation."""

from typing import Literal

from pydantic import Field

from crossflow.core.config import Config, Section
from crossflow.tasks.depth.dataset import Augmentation
from crossflow.tasks.depth.decoder import DepthTarget


class DepthSettings(Section):
    """What is specific to depth estimation: the target, its range in metres, and how a run scores itself."""

    target: DepthTarget = "log"
    """What the flow predicts: log | linear | disparity."""
    near: float = Field(0.1, gt=0)
    """Metres; nearer measurements count as missing."""
    far: float = Field(100.0, gt=0)
    """Metres; farther measurements count as missing."""
    alignment: Literal["none", "median", "affine"] = "none"
    """How predictions are aligned before they are scored: none | median | affine."""
    crop: Literal["none", "eigen", "garg", "nyu"] = "none"
    """The part of a whole picture that is scored; none: what the data format leaves of it."""
    augmentation: Augmentation = Augmentation()


class DepthConfig(Config):
    """The configuration of a depth run."""

    depth: DepthSettings = DepthSettings()
