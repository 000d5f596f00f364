"""Prompts and pictures in any common form, read into one form, and the ids that key their noise.

H W height and width in pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.data.images import load_image, over_white, picture_pixels

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A path, or pixels: see `read_picture`."""
Input = str | np.ndarray
"""An input as the tasks take it: a prompt, or a picture uint8 (H, W, 3)."""
NEGATIVE = frozenset({"negative", "negative_prompt", "away_from"})
"""Names by which people ask for a negative prompt, see `no_negative_prompt`."""


def read_inputs(inputs: object, kind: str) -> list[Input]:
    """Reads one input, or a list or tuple of inputs.

    kind: text | image, the kind that the model takes. Raises UserError for any other, and for an empty list.
    """
    values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not values:
        raise UserError("Expected at least one input, got an empty list.")
    return [read_prompt(value) if kind == "text" else read_picture(value) for value in values]


def read_prompt(value: object) -> str:
    """A prompt as text that every key, tokenizer and file can hold: lone surrogates become `?`."""
    if not isinstance(value, str):
        raise UserError(f"Expected a prompt (a str), got {_describe(value)}. This model turns text into pictures.")
    return value.encode("utf-8", "replace").decode("utf-8")


def read_picture(value: object) -> np.ndarray:
    """A picture as uint8 (H, W, 3) RGB.

    Accepts a path; a PIL image of any mode; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a tensor of these
    shapes, or with channels first. Pixels are uint8, or floating point in [0, 1]. Grey is repeated into three
    channels; transparency is laid over white, as when a file is read.

    Raises UserError for anything else.

    >>> read_picture(np.full((2, 3), 0.5, np.float32)).shape
    (2, 3, 3)
    """
    try:
        if isinstance(value, (str, Path)):
            return load_image(value)
        if isinstance(value, Image.Image):
            return picture_pixels(value)
    except ValueError as error:
        place = f"{value}: " if isinstance(value, (str, Path)) else ""
        raise UserError(f"{place}{error}. Expected a picture.") from error
    if isinstance(value, Tensor):
        pixels = _channels_last(value).detach().cpu().numpy()
    elif isinstance(value, np.ndarray):
        pixels = value
    else:
        raise UserError(
            f"Expected a picture (a path, a PIL image, an array or a tensor), got {_describe(value)}. "
            "This model takes pictures."
        )
    return _to_rgb(pixels)


def no_negative_prompt(prompt: str, negative: str) -> UserError:
    """The answer to a negative prompt: why there is none, and what takes its place."""
    return UserError(
        "A model without noise takes no negative prompt. Its source is the latent at which the flow begins; the "
        "velocity sees that latent on its way and no text, so it cannot be guided away from another text. Move the "
        f'source away instead: `crossflow arithmetic --base "{prompt}" --minus "{negative}" --strength 0.5`; or '
        "stay closer to the prompt with a larger --guidance, or with --guide-with a weaker run."
    )


def item_ids(inputs: Sequence[Input], num: int = 1) -> list[str]:
    """The ids that key the noise of `num` outputs per input, in order: INPUT/K.

    INPUT is the prompt itself, or a digest of the picture's pixels. K counts from 0 for each distinct input, so that an
    output depends on its input and K alone, not on other inputs or on file names.

    >>> item_ids(["a cube", "a cone", "a cube"])
    ['a cube/0', 'a cone/0', 'a cube/1']
    >>> item_ids(["a cube"], num=2)
    ['a cube/0', 'a cube/1']
    """
    count: Counter[str] = Counter()
    ids = []
    for name in [_name(value) for value in inputs for _ in range(num)]:
        ids.append(f"{name}/{count[name]}")
        count[name] += 1
    return ids


def _name(value: Input) -> str:
    if isinstance(value, str):
        return value
    digest = hashlib.blake2b(repr((value.shape, value.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(value).data)
    return f"picture:{digest.hexdigest()}"


def _channels_last(tensor: Tensor) -> Tensor:
    """(C, H, W) -> (H, W, C); ambiguous shapes are read as channels first."""
    return tensor.movedim(0, -1) if tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4) else tensor


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of uint8 or floating-point (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)."""
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        hint = " Pass a batch as a list of pictures." if pixels.ndim == 4 else " Put the channels last."
        raise UserError(
            f"Expected a picture of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {pixels.shape}.{hint}"
        )
    if pixels.size == 0:
        raise UserError(f"Expected a picture with at least one pixel, got shape {pixels.shape}.")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = _to_uint8(pixels)
    elif pixels.dtype != np.uint8:
        raise UserError(
            f"Expected pixels as uint8 in 0 to 255 or floating point in [0, 1], got {pixels.dtype}. "
            "Convert them with picture.astype(numpy.uint8)."
        )
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 4:
        return over_white(pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise UserError(f"{(~np.isfinite(pixels)).sum()} of {pixels.size} pixel values are NaN or infinite.")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        raise UserError(
            f"Expected floating-point pixels in [0, 1], got values from {low:g} to {high:g}. "
            "Divide values up to 255 by 255; bring x in [-1, 1] to (x + 1) / 2."
        )
    return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)


def _describe(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
