"""Weights and inputs that follow from their names: what the recorded numbers beside this file were computed with.

Every tensor is standard normal from a PCG64 generator seeded with the CRC-32 of its name. Matrices and kernels are
divided by the root of their fan-in; vectors are a tenth as wide, around 1 for gains and around 0 for the rest.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

GAINS = ("g", "weight", "scale", "param0", "param1")


def _normal(name: str, shape: Sequence[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """The tensor that stands for the reference checkpoint's `key`."""
    values = _normal(key, shape)
    if len(shape) >= 2:
        values = values / np.float32(math.sqrt(math.prod(shape[1:])))
    elif len(shape) == 1 and shape[0] > 1:
        values = np.float32(0.1) * values + np.float32(key.rpartition(".")[2] in GAINS)
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(tuple(shape)))


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A whole reference checkpoint of these keys and shapes."""
    return {key: weight(key, shape) for key, shape in shapes.items()}


def tensor_of(name: str, shape: Sequence[int]) -> Tensor:
    """An input called `name` ("fixture/tensor")."""
    return torch.from_numpy(_normal(f"input:{name}", shape))
