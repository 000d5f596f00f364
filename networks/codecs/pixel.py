"""The pixel codec: the latent is the picture itself, scaled to unit variance."""

import torch.nn.functional as F
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.source import Posterior
from crossflow.networks.codecs.base import Codec, PerChannel


class PixelCodec(Codec):
    """z = (x - shift) * scale, with squares of `factor` x `factor` pixels moved into channels; no network.

    image_channels: 3, or 1 for depth maps; scale, shift: see `fit_scale`, which gives latents of unit variance.
    """

    kind = "pixel"

    def __init__(
        self,
        image_channels: int = 3,
        factor: int = 1,
        scale: PerChannel = 1.0,
        shift: PerChannel = 0.0,
        chunk: int = 256,
    ) -> None:
        if image_channels not in (1, 3):
            raise UserError(f"image_channels must be 3 (colour) or 1 (depth), got {image_channels}.")
        if factor < 1:
            raise UserError(f"The factor of a pixel codec must be at least 1, got {factor}.")
        super().__init__(image_channels * factor**2, factor, scale, shift, chunk)
        self.image_channels = image_channels

    def options(self) -> dict[str, int | str]:
        """The arguments of the constructor, other than scale and shift."""
        return {"image_channels": self.image_channels, "factor": self.factor, "chunk": self.chunk}

    def _encode(self, x: Tensor) -> Posterior:
        if x.shape[1] != self.image_channels:
            raise UserError(f"This pixel codec takes {self.image_channels} channels, got images with {x.shape[1]}.")
        return Posterior(F.pixel_unshuffle(x, self.factor))

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(raw, self.factor)
