"""Super-resolution: a picture enlarged by bicubic interpolation -> a sharp one (CrossFlow section 5.4).

The enlarged picture is itself the source z0, or its mean after a correction; the flow adds what it lacks. Any scale
factor, pictures of any size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from crossflow.data.images import save_png
from crossflow.data.item import Item
from crossflow.data.tiles import Tiles
from crossflow.networks.trunks import IdentityTrunk
from crossflow.tasks.base import Example, Pieces, PixelParts, PixelTask, as_picture, to_tensors
from crossflow.tasks.sr.config import SrConfig
from crossflow.tasks.sr.dataset import enlarge, example
from crossflow.tasks.sr.encoder import build_residual
from crossflow.tasks.sr.scoring import SrScoring


class Adapter(PixelTask[SrConfig, PixelParts]):
    """Super-resolution by `sr.scale`, in pixel space."""

    name = "sr"
    hub_tag = "image-to-image"
    Config = SrConfig
    Scoring = SrScoring
    needs = frozenset({"image"})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(3, crop, crop): training crops in the high resolution."""
        return (3, self.config.crop, self.config.crop)

    def build_trunk(self) -> nn.Module:
        """The enlarged picture itself, with a learned variance if the source is variational; or with a correction."""
        if self.config.sr.trunk == "residual":
            return build_residual(self.config.source, self.config.backbone.patch)
        return IdentityTrunk(3, variational=self.config.source.kind == "variational")

    @classmethod
    def transform(cls, config: SrConfig, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        """A square of the picture and its bicubic version; see `dataset.example`."""
        chance = generator if augment else None
        return example(item, config.crop, config.sr.ratio, config.sr.augmentation, chance)

    def pieces(self, value: np.ndarray) -> Pieces:
        """Tiles of the enlarged picture."""
        return self._cut(enlarge(value, self.config.sr.ratio))

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """Tiles of a finished picture uint8 (H, W, 3), or of the path of one, as scaled pixels."""
        tiles = self._cut(as_picture(value))
        latents = self.parts.codec.encode(to_tensors(tiles.values).to(self.device)).mean
        return Pieces(list(latents), tiles.join, tiles.layout, tiles.numbered)

    def _cut(self, image: np.ndarray) -> Pieces:
        # Tiles start on the grid of the low resolution, because the source repeats with its pixels.
        tiles = Tiles.of(image, self.config.sr.tile, self.config.sr.overlap, self.config.grain)
        return Pieces(tiles.pieces, tiles.join, tiles.shape, numbered=True)

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes a picture uint8 (H, W, 3) as PNG, with the scale in its name."""
        return [save_png(output, stem.with_name(f"{stem.name}_x{self.config.sr.scale}.png"), metadata)]
