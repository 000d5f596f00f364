"""Pictures and depth maps between files, arrays and tensors.

Pictures are uint8 (H, W, 3) RGB as arrays and float32 (3, H, W) in [-1, 1] as tensors. Depth maps are float32 (H, W)
in metres, 0 where nothing was measured. Colour profiles are not applied: numbers are taken as sRGB.

H W height and width in pixels, C channels, B batch.
"""

import io
import json
import math
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from crossflow.core.files import write_atomically

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 picture: 300 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # none that starts another program
EXIF_ORIENTATION = 0x0112
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


# ---------------------------------------------------------------------------------------------------------- reading


def load_image(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, upright: bool = True
) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3) RGB.

    The EXIF rotation is applied (an unreadable EXIF block means upright), transparency is laid over white, grey is
    repeated into three channels, 16-bit grey is scaled by 1/257, palettes and CMYK are converted; of an animation the
    first frame is taken.

    Args:
        source: path, encoded bytes, or an open binary file.
        max_pixels: largest H * W that is decoded; a small file can claim a picture that fills the memory.
        upright: apply the EXIF rotation; without, pixels stay as they lie in the file.

    Raises:
        ValueError: the picture cannot be read; the text is the reason, ready for a list of bad items.
    """
    with _open(source, max_pixels) as image:
        try:
            orientation = _orientation(image)
            rgb = _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost any type on damaged data
            raise ValueError(f"the picture cannot be decoded: {error or type(error).__name__}") from error
    if upright and orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    return np.array(rgb)


def load_depth_png(source: str | Path | bytes | BinaryIO, *, units_per_metre: float = 1000.0) -> np.ndarray:
    """Read a 16-bit grey PNG as depth, float32 (H, W) in metres, 0 where nothing was measured.

    Args:
        source: path, encoded bytes, or an open binary file.
        units_per_metre: what one metre is in the file: 1000 for millimetres, 256 for KITTI, 5000 for TUM.

    Raises:
        ValueError: the file cannot be read or does not hold 16-bit grey values; the text is the reason.
    """
    with _open(source, MAX_PIXELS) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise ValueError(f"a depth map is a 16-bit grey PNG, this picture has mode {image.mode}")
        try:
            units = np.array(image)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"the depth map cannot be decoded: {error or type(error).__name__}") from error
    return (units.astype(np.float64) / units_per_metre).astype(np.float32)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries of a PNG, by key, as `save_png` wrote them (values that were not text come as JSON)."""
    with _open(path, MAX_PIXELS) as image:
        image.load()  # text may stand behind the pixels
        return dict(getattr(image, "text", {}))


def _open(source: str | Path | bytes | BinaryIO, max_pixels: int) -> Image.Image:
    """Open without decoding; every failure is a ValueError whose text is the reason."""
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below, as an error
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is larger than the limit of {max_pixels:,} pixels ({error})") from error
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"not a picture in a known format ({_describe(source)}; known: {', '.join(FORMATS)})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
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
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; decodes the file."""
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels from {low} to {high}, only 0 to 65535 have a known brightness")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known brightness range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = np.array(image.convert("RGBA")).astype(np.float64)
        alpha = rgba[..., 3:] / 255
        return Image.fromarray(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------- arrays <-> tensors


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) -> float32 (3, H, W) or (B, 3, H, W) in [-1, 1]."""
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"expected uint8 (H, W, 3) or (B, H, W, 3), got {image.dtype} {image.shape}")
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3)))
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    """float (3, H, W) or (B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) or (B, H, W, 3), clipped and rounded.

    Raises:
        ValueError: NaN values, which no brightness stands for.
    """
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3:
        raise ValueError(f"expected (3, H, W) or (B, 3, H, W), got {tuple(tensor.shape)}")
    values = tensor.detach().to("cpu", torch.float32)
    if torch.isnan(values).any():
        raise ValueError(f"{int(torch.isnan(values).sum())} of {values.numel()} pixel values are NaN: no picture")
    pixels = ((values + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return np.ascontiguousarray(np.moveaxis(pixels.numpy(), -3, -1))


# ----------------------------------------------------------------------------------------------------- resizing


def center_crop_resize(
    image: np.ndarray, size: int | tuple[int, int], *, resample: Literal["bicubic", "nearest"] = "bicubic"
) -> np.ndarray:
    """Crop the largest centred box of the wanted aspect ratio and resize it.

    Args:
        image: uint8 (H, W, 3) picture, or with `nearest` any (H, W) or (H, W, C) array such as a depth map. A picture
            and a depth map of one size get the same crop, so they stay registered.
        size: side of a square, or (height, width), in pixels.
        resample: `bicubic` is antialiased; `nearest` takes the value at each output pixel's centre and never mixes
            values, as depth maps with holes need.

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
    """MATLAB's `imresize(image, scale)`: bicubic, antialiased when shrinking, as all published SR tables use it.

    Output sides are ceil(scale * side). Output pixel i (from 1) looks at u = i / scale + (1 - 1 / scale) / 2; its
    weights are k(u - j) with Keys' kernel (a = -0.5), for scale < 1 widened to scale * k(scale * x), normalised to sum
    1. Height first, then width. Equal, byte for byte, to the published MATLAB-made low-resolution sets.

    Args:
        image: (H, W) or (H, W, C). uint8 is rounded and clipped to uint8 after each of the two passes, as MATLAB does;
            floating point is computed and returned in float64, without clipping.
        scale: output side / input side, > 0; of a fraction the output sides are exact.
        border: what lies beyond the picture: `mirror` (edge pixel included) as in today's MATLAB, or the edge pixel
            repeated as in the older MATLAB that made, for instance, the SelfExSR files.
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
        # one tap at a time: the taps of a strong reduction would not fit in memory together
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


def rgb_to_y(image: np.ndarray) -> np.ndarray:
    """Luma of MATLAB's `rgb2ycbcr` (ITU-R BT.601, studio range): (..., 3) values 0..255 -> float64 (...) in [16, 235].

    MATLAB rounds the result for uint8 input; here it stays unrounded.
    """
    return 16.0 + image.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255)


# ------------------------------------------------------------------------------------------------------- writing


def save_png(array: np.ndarray, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write uint8 (H, W, 3), uint8 (H, W) or uint16 (H, W) as PNG, whole or not at all.

    Args:
        array: the pixels.
        path: the file; its folder is made when missing.
        metadata: text entries (prompt, seed, settings). Values that are not text are written as JSON; text outside
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
        info.add_text(key, _printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", pnginfo=info)
    return write_bytes(Path(path), buffer.getvalue())


def save_depth_png(
    depth: np.ndarray,
    path: str | Path,
    *,
    units_per_metre: float = 1000.0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write depth (H, W) in metres as a 16-bit grey PNG; not finite or not positive values become 0, "not measured".

    Raises:
        ValueError: a depth does not fit in 16 bits (65.535 m at the default unit); smaller `units_per_metre` hold more.
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


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, in a folder that is made when missing, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


# ------------------------------------------------------------------------------------------------------ pictures


def colour_depth(depth: np.ndarray, *, near: float | None = None, far: float | None = None) -> np.ndarray:
    """Depth (H, W) in metres as a uint8 (H, W, 3) picture in the turbo colours: blue near, red far, black unmeasured.

    Args:
        depth: metres; not finite or not positive values are unmeasured.
        near, far: metres at the ends of the colour scale; the smallest and largest measured depth when None. Give both
            when pictures are to be compared.
    """
    from matplotlib import colormaps

    if depth.ndim != 2:
        raise ValueError(f"expected depth (H, W), got {depth.shape}")
    valid = np.isfinite(depth) & (depth > 0)
    low = near if near is not None else (float(depth[valid].min()) if valid.any() else 0.0)
    high = far if far is not None else (float(depth[valid].max()) if valid.any() else 1.0)
    share = np.clip((np.where(valid, depth, low).astype(np.float64) - low) / max(high - low, 1e-9), 0, 1)
    colours = np.asarray(colormaps["turbo"](share))[..., :3]
    return np.where(valid[..., None], np.rint(colours * 255), 0).astype(np.uint8)


def sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str] = (),
    *,
    columns: int | None = None,
    cell: int | None = None,
    title: str = "",
    font_size: int = 13,
    max_lines: int = 4,
) -> np.ndarray:
    """Lay pictures in a grid with their captions below, on white.

    Args:
        pictures: uint8 (H, W, 3) or (H, W), of any sizes. Each is scaled to fit its cell, keeping its aspect ratio:
            larger ones shrink antialiased, smaller ones grow by whole pixels so that what was computed stays visible.
        captions: one per picture, or none at all. Wrapped to the cell's width, cut with "..." after `max_lines`; any
            text is accepted, characters without a glyph show as boxes.
        columns: pictures per row; None makes the grid about square.
        cell: side of a cell in pixels; None takes the largest picture's side, within 96 to 512.
        title: one line above the grid.
        font_size, max_lines: of the captions.

    Returns:
        uint8 (H, W, 3).
    """
    if not pictures:
        raise ValueError("a sheet needs at least one picture")
    if captions and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions")
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    if cell is None:
        cell = min(512, max(96, *(side for picture in pictures for side in picture.shape[:2])))
    margin = 8
    font = _font(font_size)
    line_height = math.ceil(font_size * 1.35)
    wrapped = [_wrap(caption, font, cell, max_lines) for caption in captions]
    fitted = [_fit(picture, cell) for picture in pictures]
    starts = range(0, len(pictures), columns)
    heights = [max(image.height for image in fitted[start : start + columns]) for start in starts]
    text_heights = [max((len(lines) for lines in wrapped[s : s + columns]), default=0) * line_height for s in starts]
    top = margin + (line_height + margin if title else 0)
    canvas = Image.new(
        "RGB",
        (margin + columns * (cell + margin), top + sum(heights) + sum(text_heights) + len(starts) * margin),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        for line in _wrap(title, font, canvas.width - 2 * margin, 1):
            draw.text((margin, margin), line, fill="black", font=font)
    for row, start in enumerate(starts):
        bottom = top + heights[row]
        for column, image in enumerate(fitted[start : start + columns]):
            left = margin + column * (cell + margin)
            canvas.paste(image, (left + (cell - image.width) // 2, bottom - image.height))
            for number, line in enumerate(wrapped[start + column] if wrapped else ()):
                draw.text((left, bottom + 2 + number * line_height), line, fill="black", font=font)
        top = bottom + text_heights[row] + margin
    return np.array(canvas)


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise ValueError(f"expected uint8 (H, W, 3) or (H, W), got {picture.dtype} {picture.shape}")
    image = Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
    ratio = cell / max(image.size)
    if ratio >= 1:
        whole = int(ratio)
        return image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows far more scripts than Pillow's own font."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size) if path.exists() else ImageFont.load_default(size)


def _printable(text: str) -> str:
    """Without what neither UTF-8 nor a PNG text entry can hold: lone surrogates and NUL."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def _wrap(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """Greedy lines no wider than `width` pixels; words wider than a line are broken."""
    text = " ".join(_printable(text)[:2000].split())  # more than any sheet shows, and measuring text is slow
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        while True:
            candidate = f"{line} {word}".strip()
            if font.getlength(candidate) <= width:
                line = candidate
                break
            if line:
                lines.append(line)
                line = ""
                continue
            kept = max(1, next(n for n in range(1, len(word) + 1) if font.getlength(word[:n]) > width) - 1)
            lines.append(word[:kept])
            word = word[kept:]
            if not word:
                break
        if len(lines) > max_lines:
            break
    if line:
        lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "..."]
    return lines
