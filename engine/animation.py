"""Animations of pictures: GIF (Pillow), and MP4 with the extra `video` (imageio-ffmpeg).

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
"""Side lengths in pixels: smaller frames are enlarged towards SMALL; GIFs, which compress poorly, stay within LARGE."""
VIDEO_EXTRA = 'pip install "crossflow-toolkit[video]"'


def save_gif(frames: Sequence[np.ndarray], path: Path, fps: float = 8.0) -> Path:
    """Writes an animated GIF that loops forever, at most LARGE pixels wide and high; returns its path."""
    pictures = [Image.fromarray(frame) for frame in enlarged(frames)]
    for picture in pictures:
        picture.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    duration = max(20, round(1000 / fps))  # milliseconds; viewers slow down faster animations
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return write_atomically(path, buffer.getvalue())


def can_write_mp4() -> bool:
    """Whether imageio-ffmpeg is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def save_mp4(frames: Sequence[np.ndarray], path: Path, fps: float = 8.0) -> Path:
    """Writes H.264 in MP4, atomically; returns its path.

    Odd sides are made even, as the colour format requires, by repeating the last row or column.

    Raises UserError without imageio-ffmpeg, and when ffmpeg fails.
    """
    if not can_write_mp4():
        raise UserError(f"An MP4 needs the package imageio-ffmpeg, which is not installed: {VIDEO_EXTRA}.")
    import imageio_ffmpeg

    even = [
        np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
        for frame in enlarged(frames)
    ]
    height, width = even[0].shape[:2]
    try:
        with replacing(path) as temporary:
            # Blocks of 1: ffmpeg would otherwise resize the frames to multiples of 16.
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
    """Frames enlarged by the largest integer factor that keeps them within SMALL, so that single pixels stay visible.

    Raises ValueError for frames of several sizes, or none.
    """
    if not frames or len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"expected frames of one size, got {sorted({frame.shape for frame in frames})}")
    times = max(1, SMALL // max(frames[0].shape[:2]))
    return [frame.repeat(times, 0).repeat(times, 1) for frame in frames]
