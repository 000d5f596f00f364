"""Latents <-> pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crossflow.data.images import to_tensor, to_uint8
from crossflow.networks.codecs.base import Codec


def decode(codec: Codec, z1: Tensor) -> list[np.ndarray]:
    """Latents (B, C, H, W) -> uint8 (H, W, 3) each."""
    return list(to_uint8(codec.decode(z1.cpu())))


def pictures(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) each -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])
