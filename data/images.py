"""Pictures and depth maps between files, arrays and tensors.

Pictures are uint8 (H, W, 3) RGB as arrays and float32 (3, H, W) in [-1, 1] as tensors. Depth maps are float32 (H, W)
in metres, 0 where nothing was measured. Colour profiles are not applied: numbers are taken as sRGB.

H W height and width in pixels, C channels, B batch.
"""

import io
import json
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from crossflow.core.errors import PARSING_ERRORS
from crossflow.core.files import write_atomically

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 picture: 300 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # none that starts another program
EXIF_ORIENTATION = 0x0112
GREY_MODES = ("1", "L", "LA", "La")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPENING = threading.Lock()  # the filter that silences Pillow's size warning is global to the process


def load_image(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, upright: bool = True
) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3) RGB.

    The EXIF rotation is applied (an unreadable EXIF block means upright), transparency is laid over white, grey is
    repeated into three channels, 16-bit grey is scaled by 1/257, palettes and CMYK are converted; of an animation the
    first frame is taken.

    Args:
        source: path, encoded bytes, or an open binary file.
        max_pixels: largest H * W to decode; a small file can claim a picture larger than the memory.
        upright: apply the EXIF rotation; otherwise keep the pixels as stored.

    Raises:
        ValueError: the picture is unreadable; the text is the reason, suitable for a list of bad items.
    """
    with _open(source, max_pixels) as image:
        return picture_pixels(image, upright=upright)


def picture_pixels(image: Image.Image, *, upright: bool = True) -> np.ndarray:
    """The pixels of an open Pillow image as uint8 (H, W, 3) RGB, converted as by `load_image`.

    Raises:
        ValueError: the picture cannot be decoded, or its pixels have no known brightness.
    """
    try:
        orientation = _orientation(image)
        rgb = _to_rgb(image)
    except PARSING_ERRORS as error:
        raise ValueError(f"the picture cannot be decoded: {error or type(error).__name__}") from error
    if upright and orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    return np.array(rgb)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) laid over white: uint8 (H, W, 3)."""
    values = rgba.astype(np.float64)
    alpha = values[..., 3:] / 255
    return np.rint(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def load_depth_png(source: str | Path | bytes | BinaryIO, *, units_per_metre: float = 1000.0) -> np.ndarray:
    """Read a 16-bit grey PNG as depth, float32 (H, W) in metres, 0 where nothing was measured.

    Args:
        source: path, encoded bytes, or an open binary file.
        units_per_metre: value of one metre in the file: 1000 for millimetres, 256 for KITTI, 5000 for TUM.

    Raises:
        ValueError: the file is unreadable or has no 16-bit grey values; the text is the reason.
    """
    with _open(source, MAX_PIXELS) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise ValueError(f"expected a 16-bit grey PNG as depth map, got mode {image.mode}")
        try:
            units = np.array(image)
        except PARSING_ERRORS as error:
            raise ValueError(f"the depth map cannot be decoded: {error or type(error).__name__}") from error
    return (units.astype(np.float64) / units_per_metre).astype(np.float32)


def is_grey(image: np.ndarray, source: str | Path | bytes) -> bool:
    """Whether the file `source`, decoded to `image` uint8 (H, W, 3), stores a single channel, with or without alpha.

    The file is opened only if all three channels are equal. False for anything that is not a picture file.
    """
    if not all(np.array_equal(image[..., 0], image[..., channel]) for channel in (1, 2)):
        return False
    try:
        with _open(source, MAX_PIXELS) as file:
            return file.mode in GREY_MODES or file.mode.startswith("I")
    except ValueError:
        return False


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries of a PNG by key, as written by `save_png` (values other than text as JSON)."""
    with _open(path, MAX_PIXELS) as image:
        image.load()  # text entries may follow the pixels
        return dict(getattr(image, "text", {}))


def _open(source: str | Path | bytes | BinaryIO, max_pixels: int) -> Image.Image:
    """Opens a picture without decoding it. Every failure is a ValueError whose text is the reason."""
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is larger than the limit of {max_pixels:,} pixels ({error})") from error
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"not a picture in a known format ({_describe(source)}; known: {', '.join(FORMATS)})"
        ) from error
    except PARSING_ERRORS as error:
        raise ValueError(f"the file cannot be opened: {error or type(error).__name__}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(f"the picture has {width:,} x {height:,} pixels, the limit is {max_pixels:,}")
    return image


def _describe(source: str | Path | bytes | BinaryIO) -> str:
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    if isinstance(source, (str, Path)):
        size = os.path.getsize(source)
        return f"{size:,} bytes" if size else "the file is empty"
    return "an open file"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except PARSING_ERRORS:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; decodes the file."""
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels from {low} to {high}; brightness is defined for 0 to 65535 only")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined brightness range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return Image.fromarray(over_white(np.array(image.convert("RGBA"))))
    return image.convert("RGB")


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) -> float32 (3, H, W) or (B, 3, H, W) in [-1, 1]."""
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"expected uint8 (H, W, 3) or (B, H, W, 3), got {image.dtype} {image.shape}")
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3)))
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    """float (3, H, W) or (B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) or (B, H, W, 3), clipped and rounded.

    Raises:
        ValueError: NaN values.
    """
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3:
        raise ValueError(f"expected (3, H, W) or (B, 3, H, W), got {tuple(tensor.shape)}")
    values = tensor.detach().float()
    pixels = ((values + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).movedim(-3, -1).contiguous()
    num_bad = torch.isnan(values).sum()
    finished = pixels.cpu().numpy()  # the one copy from a device: a quarter of the bytes, in the final order
    if num_bad:
        raise ValueError(f"{int(num_bad)} of {values.numel()} pixel values are NaN")
    return finished


def rgb_to_y(image: np.ndarray) -> np.ndarray:
    """Luma of MATLAB's `rgb2ycbcr` (ITU-R BT.601, studio range): (..., 3) values 0..255 -> float64 (...) in [16, 235].

    MATLAB rounds the result for uint8 input; here it stays unrounded.
    """
    return 16.0 + image.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255)


def save_png(array: np.ndarray, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write uint8 (H, W, 3), uint8 (H, W) or uint16 (H, W) as PNG, atomically.

    Args:
        array: the pixels.
        path: the file; missing folders are created.
        metadata: text entries (prompt, seed, settings). Values other than text are written as JSON; text outside
            Latin-1 becomes an iTXt entry. Keys have 1 to 79 Latin-1 characters.

    Returns:
        the path written.
    """
    picture = (array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3) or (
        array.dtype in (np.uint8, np.uint16) and array.ndim == 2
    )
    if not picture or 0 in array.shape:
        raise ValueError(f"expected uint8 (H, W, 3), uint8 (H, W) or uint16 (H, W), got {array.dtype} {array.shape}")
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        if not 1 <= len(key) <= 79 or any(ord(letter) > 255 for letter in key):
            raise ValueError(f"a PNG metadata key has 1 to 79 Latin-1 characters, got {key!r}")
        info.add_text(key, printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", pnginfo=info)
    return write_atomically(Path(path), buffer.getvalue())


def save_depth_png(
    depth: np.ndarray,
    path: str | Path,
    *,
    units_per_metre: float = 1000.0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write depth (H, W) in metres as a 16-bit grey PNG; values that are not finite and positive become 0 (unmeasured).

    Raises:
        ValueError: a depth exceeds 16 bits (65.535 m at the default unit); fewer `units_per_metre` extend the range.
    """
    if depth.ndim != 2:
        raise ValueError(f"expected depth (H, W), got {depth.shape}")
    metres = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float64)
    units = np.rint(metres * units_per_metre)
    if units.max(initial=0) > 65535:
        raise ValueError(
            f"a depth of {metres.max():.1f} m does not fit: at {units_per_metre:g} units per metre 16 bits reach "
            f"{65535 / units_per_metre:.1f} m; choose fewer units per metre"
        )
    return save_png(units.astype(np.uint16), path, {"units_per_metre": units_per_metre, **(metadata or {})})


def printable(text: str) -> str:
    """The text without lone surrogates and NUL, which neither UTF-8 nor a PNG text entry can represent."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
