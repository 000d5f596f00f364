"""Pictures to look at: grids with captions, and depth in colours.

H height, W width in pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crossflow.data.images import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def colour_depth(depth: np.ndarray, *, near: float | None = None, far: float | None = None) -> np.ndarray:
    """Depth (H, W) in metres as a uint8 (H, W, 3) picture in the turbo colours: blue near, red far, black unmeasured.

    Args:
        depth: metres; not finite or not positive values are unmeasured.
        near, far: metres at the ends of the colour scale; None means the smallest and largest measured depth. Set both
            to compare pictures.
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


def colour_spread(values: np.ndarray) -> np.ndarray:
    """Values (H, W) >= 0 as a uint8 (H, W, 3) picture in the turbo colours: blue 0, red the largest."""
    from matplotlib import colormaps

    share = values.astype(np.float64) / max(float(values.max()), 1e-12)
    return np.rint(np.asarray(colormaps["turbo"](share))[..., :3] * 255).astype(np.uint8)


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
            larger ones are reduced with antialiasing, smaller ones enlarged by whole factors so that pixels stay sharp.
        captions: one per picture, or none at all. Wrapped to the cell's width, cut with "..." after `max_lines`; any
            text is accepted; characters without a glyph appear as boxes.
        columns: pictures per row; None makes the grid about square.
        cell: side of a cell in pixels; None takes the largest picture's side, within 96 to 512.
        title: one line above the grid.
        font_size, max_lines: of the captions.

    Returns:
        uint8 (H, W, 3).
    """
    if not pictures:
        raise ValueError("expected at least one picture, got none")
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


def _font(size: int) -> Font:
    """DejaVu Sans, which comes with matplotlib and covers far more scripts than Pillow's own font."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size) if path.exists() else ImageFont.load_default(size)


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Greedy lines no wider than `width` pixels; words wider than a line are broken."""
    text = " ".join(printable(text)[:2000].split())  # more than fits on any sheet, and measuring text is slow
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
