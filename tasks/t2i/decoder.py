"""Latents -> pictures."""

import numpy as np
from torch import Tensor

from crossflow.data.images import to_uint8
from crossflow.networks.codecs.base import Codec


def decode(codec: Codec, z1: Tensor, text_features: Tensor | None = None) -> list[np.ndarray]:
    """Latents (B, *latent) -> pictures uint8 (H, W, 3). text_features (B, N, D): for a codec that reads them."""
    return list(to_uint8(codec.decode(z1, text_features if codec.reads_text else None)))
