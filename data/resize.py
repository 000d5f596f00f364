"""Resizing of pictures: centred crops, and bicubic interpolation as MATLAB computes it.

H height, W width in pixels, C channels.
"""

import math
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image


def center_crop_resize(
    image: np.ndarray, size: int | tuple[int, int], *, resample: Literal["bicubic", "nearest"] = "bicubic"
) -> np.ndarray:
    """Crop the largest centred box with the aspect ratio of `size` and resize it.

    Args:
        image: uint8 (H, W, 3) picture, or with `nearest` any (H, W) or (H, W, C) array such as a depth map. A picture
            and a depth map of the same size get the same crop, so they stay aligned.
        size: side of a square, or (height, width), in pixels.
        resample: `bicubic` is antialiased; `nearest` takes the value at each output pixel's centre and never mixes
            values, which depth maps with holes require.

    Returns:
        array of the same type, (height, width) or (height, width, C).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    full_h, full_w = image.shape[:2]
    box_h = min(full_h, max(1, round(full_w * height / width)))
    box_w = min(full_w, max(1, round(full_h * width / height)))
    top, left = (full_h - box_h) // 2, (full_w - box_w) // 2
    if resample == "bicubic":
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"bicubic needs a uint8 (H, W, 3) picture, got {image.dtype} {image.shape}")
        cropped = Image.fromarray(image[top : top + box_h, left : left + box_w])
        return np.array(cropped.resize((width, height), Image.Resampling.BICUBIC))
    if resample != "nearest":
        raise ValueError(f"unknown resampling {resample!r}; known: bicubic, nearest")
    rows = top + ((np.arange(height) + 0.5) * box_h / height).astype(np.int64)
    columns = left + ((np.arange(width) + 0.5) * box_w / width).astype(np.int64)
    return image[rows[:, None], columns[None, :]]


def imresize_matlab(
    image: np.ndarray, scale: float | Fraction, *, border: Literal["mirror", "repeat"] = "mirror"
) -> np.ndarray:
    """MATLAB's `imresize(image, scale)`: bicubic, antialiased when reducing, as in all published SR tables.

    Output sides are ceil(scale * side). Output pixel i (from 1) looks at u = i / scale + (1 - 1 / scale) / 2; its
    weights are k(u - j) with Keys' kernel (a = -0.5), for scale < 1 widened to scale * k(scale * x), normalised to sum
    1. Height first, then width. Equal, byte for byte, to the published MATLAB-made low-resolution sets.

    Args:
        image: (H, W) or (H, W, C). uint8 is rounded and clipped to uint8 after each of the two passes, as MATLAB does;
            floating point is computed and returned in float64, without clipping.
        scale: output side / input side, > 0; of a fraction the output sides are exact.
        border: how the picture continues beyond its edge: `mirror` (edge pixel included) as in current MATLAB, or
            `repeat` the edge pixel as in the older MATLAB that produced, for instance, the SelfExSR files.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"expected (H, W) or (H, W, C) with at least one pixel, got {image.shape}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"expected uint8 or floating-point pixels, got {image.dtype}")
    result = image.astype(np.float64)
    for axis in (0, 1):
        weights, indices = _matlab_weights(image.shape[axis], scale, border)
        moved = np.moveaxis(result, axis, 0)
        # one tap at a time: all taps of a strong reduction would not fit in memory
        mixed = np.zeros((len(weights), *moved.shape[1:]))
        for tap in range(weights.shape[1]):
            mixed += weights[:, tap].reshape(-1, *[1] * (moved.ndim - 1)) * moved[indices[:, tap]]
        result = np.moveaxis(mixed, 0, axis)
        if image.dtype == np.uint8:
            result = np.clip(np.floor(result + 0.5), 0, 255)
    return np.ascontiguousarray(result.astype(np.uint8 if image.dtype == np.uint8 else np.float64))


def _matlab_weights(length: int, scale: float | Fraction, border: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights and input positions of each output pixel along one side, both (output length, taps)."""
    count, scale = math.ceil(length * scale), float(scale)
    stretch = min(scale, 1.0)
    support = 4.0 / stretch
    position = np.arange(1, count + 1) / scale + 0.5 * (1 - 1 / scale)  # counted from 1
    first = np.floor(position - support / 2)
    indices = first[:, None] + np.arange(math.ceil(support) + 2)
    weights = stretch * _keys_kernel(stretch * (position[:, None] - indices))
    weights /= weights.sum(axis=1, keepdims=True)
    indices = indices.astype(np.int64) - 1
    if border == "mirror":
        folded = np.mod(indices, 2 * length)
        folded = np.where(folded < length, folded, 2 * length - 1 - folded)
    elif border == "repeat":
        folded = np.clip(indices, 0, length - 1)
    else:
        raise ValueError(f"unknown border {border!r}; known: mirror, repeat")
    used = np.any(weights != 0, axis=0)
    return weights[:, used], folded[:, used]


def _keys_kernel(x: np.ndarray) -> np.ndarray:
    """Keys (1981), cubic convolution with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
