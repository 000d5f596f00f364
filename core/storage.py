"""Files of weights that are small: in half precision, or as whole numbers of eight bits with a scale per row."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from crossflow.core.errors import unknown_name
from crossflow.core.files import read_tensors, tensor_shapes

STORAGES = ("float32", "half", "int8")
"""How a file of weights may store them, see `packed`."""
SCALE = ":scale"
"""Ends the name of the scales of a tensor that is stored as int8."""


def packed(state: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    """Tensors as a small file stores them; `read_weights` restores them.

    storage: float32: as they are; half: float16; int8: matrices and kernels as whole numbers -127 ... 127 with a
    float32 scale per row (the first dimension), NAME:scale, and the rest in half precision; a weight is off by at most
    0.4 % of the largest of its row. Raises UserError for another storage.
    """
    if storage not in STORAGES:
        raise unknown_name("storage", storage, STORAGES)
    if storage == "float32":
        return dict(state)
    small: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if storage == "int8" and tensor.ndim > 1 and tensor.is_floating_point():
            scale = tensor.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            rows = scale.view(-1, *[1] * (tensor.ndim - 1))
            small |= {name: (tensor.float() / rows).round().to(torch.int8), name + SCALE: scale}
        else:
            small[name] = tensor.half() if tensor.is_floating_point() else tensor
    return small


def read_weights(path: Path, advice: str = "Use another copy.") -> dict[str, Tensor]:
    """The tensors of a file of weights, in the type they were trained in. Raises as `read_tensors`."""
    state = read_tensors(path, advice)
    for name in [name for name in state if name.endswith(SCALE)]:
        scale, weight = state.pop(name), name.removesuffix(SCALE)
        state[weight] = state[weight].float() * scale.view(-1, *[1] * (state[weight].ndim - 1))
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in state.items()}


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `read_weights` would read, from the header of the file. Raises as it does."""
    return {name: shape for name, shape in tensor_shapes(path).items() if not name.endswith(SCALE)}
