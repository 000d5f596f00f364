"""Pictures one after the other: an animated GIF (Pillow), and MP4 when the extra `video` (imageio-ffmpeg) is there.

Frames are uint8 (H, W, 3), all of one size.
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.core.files import replacing, write_atomically

SMALL, LARGE = 256, 640
"""Sides in pixels: smaller frames grow by whole pixels, and a GIF, whose size has no bounds, is not larger."""
VIDEO_EXTRA = 'pip install "crossflow-toolkit[video]"'


def save_gif(frames: Sequence[np.ndarray], path: Path, fps: float = 8.0) -> Path:
    """Writes an animated GIF that goes on for ever, at most LARGE pixels wide and high; returns its path."""
    pictures = [Image.fromarray(frame) for frame in enlarged(frames)]
    for picture in pictures:
        picture.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    duration = max(20, round(1000 / fps))  # milliseconds; viewers slow down what is faster
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return write_atomically(path, buffer.getvalue())


def can_write_mp4() -> bool:
    """Whether the package that writes MP4 is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def save_mp4(frames: Sequence[np.ndarray], path: Path, fps: float = 8.0) -> Path:
    """Writes H.264 in MP4, whole or not at all; returns its path.

    Sides are made even, as the colour format asks for, by repeating the last row or column. Raises UserError without
    imageio-ffmpeg, and when ffmpeg fails.
    """
    if not can_write_mp4():
        raise UserError(f"An MP4 needs the package imageio-ffmpeg, which is not installed: {VIDEO_EXTRA}.")
    import imageio_ffmpeg

    even = [
        np.pad(one, [(0, one.shape[0] % 2), (0, one.shape[1] % 2), (0, 0)], mode="edge") for one in enlarged(frames)
    ]
    height, width = even[0].shape[:2]
    try:
        with replacing(path) as temporary:
            # Blocks of 1: the frames are even, and ffmpeg would otherwise resize them to multiples of 16.
            writer = imageio_ffmpeg.write_frames(
                str(temporary), (width, height), fps=fps, quality=8, macro_block_size=1
            )
            writer.send(None)
            for frame in even:
                writer.send(np.ascontiguousarray(frame))
            writer.close()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} could not be written by ffmpeg: {' '.join(str(error).split())[-300:]}") from error
    return path


def enlarged(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Frames smaller than SMALL grow by whole pixels, so that what was computed stays visible."""
    if not frames or len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"frames of one size are needed, got {sorted({frame.shape for frame in frames})}")
    times = max(1, SMALL // max(frames[0].shape[:2]))
    return [frame.repeat(times, 0).repeat(times, 1) for frame in frames]
