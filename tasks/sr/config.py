"""The settings of super-resolution."""

import math
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from crossflow.core.config import Config, Section, SourceConfig
from crossflow.tasks.sr.dataset import Augmentation

LARGEST_DENOMINATOR = 10  # crops and tiles are multiples of the scale's numerator


class SrSettings(Section):
    """What is specific to super-resolution: the scale, training crops, and tiles of large pictures."""

    scale: int | float = Field(4, gt=1, le=16)
    """Factor between the low and the high resolution: whole, or a ratio of small numbers such as 1.5."""
    crop: int | None = Field(None, ge=8)
    """Side of the training crops in pixels of the high resolution; none: data.image_size."""
    tile: int = Field(128, ge=8)
    """Side of the tiles a large picture is cut into, in pixels of the high resolution."""
    overlap: int = Field(16, ge=0)
    """Pixels that neighbouring tiles share at least."""
    trunk: Literal["identity", "residual"] = "identity"
    """The mean of the source: the enlarged picture, or (residual) that plus a correction which is learned by a network
    of `source.width` and `source.depth`.
    """
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _is_a_ratio(self) -> Self:
        if abs(self.ratio - Fraction(self.scale)) > 1e-3:
            raise ValueError(f"sr.scale = {self.scale} is no ratio of small numbers; {float(self.ratio):.6g} is near.")
        return self

    @property
    def ratio(self) -> Fraction:
        """The scale in lowest terms."""
        return Fraction(self.scale).limit_denominator(LARGEST_DENOMINATOR)


class SrConfig(Config):
    """The configuration of a super-resolution run."""

    source: SourceConfig = SourceConfig(kind="deterministic")
    sr: SrSettings = SrSettings()

    @property
    def crop(self) -> int:
        """Side of the training crops in pixels of the high resolution."""
        return self.sr.crop or self.data.image_size

    @property
    def grain(self) -> int:
        """Sides of crops and tiles are multiples of it: of the scale's pixels and of the backbone's patches."""
        return math.lcm(self.sr.ratio.numerator, self.backbone.grain)

    @model_validator(mode="after")
    def _sides_are_whole(self) -> Self:
        ratio, patch = self.sr.ratio, self.backbone.grain
        unit = ratio.numerator
        scale = f"{unit} (sr.scale = {ratio})" if ratio.denominator > 1 else f"sr.scale = {unit}"
        if self.crop % unit or self.crop % patch:
            raise ValueError(
                f"The training crop of {self.crop} pixels (sr.crop, or data.image_size) must be a multiple of "
                f"{scale} and of the backbone's patches of {patch}."
            )
        if self.sr.tile % self.grain or self.sr.tile - self.sr.overlap < self.grain:
            raise ValueError(
                f"sr.tile = {self.sr.tile} must be a multiple of {scale} and of the backbone's patches of "
                f"{patch}, and larger than sr.overlap = {self.sr.overlap} by {self.grain} at least."
            )
        return self
