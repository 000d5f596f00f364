"""Latents -> pictures."""

import numpy as np
from torch import Tensor

from crossflow.tasks.common.codecs import Codec
from crossflow.tasks.common.images import to_uint8


def decode(codec: Codec, z1: Tensor) -> list[np.ndarray]:
    """Latents (B, C, h, w) -> pictures uint8 (H, W, 3)."""
    return list(to_uint8(codec.decode(z1)))
