"""How super-resolution is scored: each picture is reduced by MATLAB's bicubic interpolation and enlarged again."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from pydantic import Field

from crossflow.core.config import Section
from crossflow.core.errors import UserError
from crossflow.data.cases import Case, Tile
from crossflow.data.dataset import Examples
from crossflow.data.item import BadItem, Item
from crossflow.data.resize import center_crop_resize
from crossflow.tasks.base import Scoring
from crossflow.tasks.sr.config import SrConfig
from crossflow.tasks.sr.dataset import enlarge, reduce, to_multiple
from crossflow.tasks.sr.metric import SSIM_WINDOW, SrMetric


class SrRules(Section):
    """What a protocol may fix for super-resolution."""

    scale: int | float = Field(4, gt=1)
    """The run must enlarge by this factor."""
    crop: int | None = None
    """Side in pixels to which the centre square of every picture is resized; smaller pictures are left out. None: whole
    pictures.
    """
    shave: int | None = None
    """Pixels left out at every side; none: the scale."""


class SrScoring(Scoring[SrConfig, SrRules]):
    """PSNR and SSIM of the enlarged pictures, beside bicubic enlargement."""

    Rules = SrRules
    Metric = SrMetric
    headline = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")

    def __init__(
        self,
        config: SrConfig,
        rules: SrRules | None = None,
        *,
        seed: int = 0,
        networks: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, rules, seed=seed, networks=networks)
        if self.rules.scale != config.sr.scale:
            raise UserError(
                f"The protocol enlarges {self.rules.scale} times, this run {config.sr.scale} times (sr.scale)."
            )

    def own_rules(self) -> SrRules:
        """Whole pictures at the run's own scale."""
        return SrRules(scale=self.config.sr.scale)

    @classmethod
    def scores(cls, rules: Section) -> tuple[str, ...]:
        """PSNR and SSIM, and LPIPS where a protocol has its network."""
        return (*SrMetric.names, "lpips")

    @property
    def ratio(self) -> Fraction:
        """The scale in lowest terms."""
        return self.config.sr.ratio

    @property
    def shave(self) -> int:
        """Pixels left out at every side."""
        return math.ceil(self.rules.scale) if self.rules.shave is None else self.rules.shave

    @property
    def resize(self) -> str:
        """In words, what the model sees."""
        return "cut to multiples of the scale, MATLAB's bicubic reduction, tiles of the enlarged picture"

    def case(self, item: Item) -> Case:
        """The reduced picture uint8 (h, w, 3), and the picture; its one channel (H, W) where it was stored grey."""
        assert item.image is not None
        sharp, crop = to_multiple(item.image, self.ratio), self.rules.crop
        if crop is not None and min(item.image.shape[:2]) >= crop:
            sharp = center_crop_resize(item.image, crop)
        too_small = crop is not None and min(item.image.shape[:2]) < crop
        if too_small or min(sharp.shape[:2]) < SSIM_WINDOW + 2 * self.shave:
            raise BadItem(item.id, "too small to be scored")
        return Case(item.id, reduce(sharp, self.ratio), sharp[..., 0] if item.grey else sharp, item)

    def metric(self, *, thorough: bool = False) -> SrMetric:
        """The metric under these rules."""
        return SrMetric(scale=self.ratio.numerator, shave=self.shave, lpips=self.networks.get("lpips"))

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any]:
        """Bicubic enlargement."""
        return lambda case: enlarge(case.input, self.ratio)

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        """The bicubic enlargement, the output and the truth."""
        return [
            Tile(enlarge(case.input, self.ratio), "bicubic"),
            Tile(output, "output"),
            Tile(case.truth if case.truth.ndim == 3 else np.stack([case.truth] * 3, axis=-1), "truth"),
        ]
