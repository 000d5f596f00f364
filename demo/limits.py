"""What a visitor may ask for: bounds of texts, pictures and numbers, whatever the browser sent."""

from dataclasses import dataclass

import numpy as np

from crossflow.core.errors import UserError, unknown_name
from crossflow.data.images import load_depth_png, load_image
from crossflow.data.tiles import resize_image
from crossflow.engine.inputs import read_prompt
from crossflow.engine.sample import Pipeline

MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 20.0
MAX_RATIO = 8
"""Of the sides of a picture: models bring the shorter side to their size, whatever becomes of the other."""
NO_CONTROL = dict.fromkeys((*range(32), 127), " ")


@dataclass(frozen=True)
class Limits:
    """Bounds of one request."""

    prompt: int = 300
    """Characters."""
    num: int = 8
    """Outputs."""
    steps: int = 100
    """Solver steps."""
    frames: int = 12
    """Frames of an interpolation, states of a trajectory, items of an evaluation."""
    side: int = 1024
    """Pixels along the longer side of a picture; larger ones are reduced to it."""
    pieces: int = 96
    """Tiles of a picture; a picture of more is reduced further."""
    decoded: int = 40_000_000
    """Pixels of an uploaded file, which are decoded before it is reduced."""
    upload: int = 16 * 2**20
    """Bytes of an uploaded file."""
    body: int = 2**17
    """Bytes of any other request."""
    waiting: int = 200
    """Visitors in the queue."""

    def text(self, value: object, name: str) -> str:
        """A prompt of at least one visible character, its control characters and line ends as spaces."""
        text = " ".join(read_prompt(value).translate(NO_CONTROL).split()) if isinstance(value, str) else ""
        if not text:
            raise UserError(f"{name} is empty. Type a sentence, or choose one of the examples.")
        if len(text) > self.prompt:
            raise UserError(f"{name} has {len(text):,} characters; at most {self.prompt} are read. Shorten it.")
        return text

    def picture(self, path: object, name: str) -> np.ndarray:
        """The uploaded picture uint8 (H, W, 3), at most `side` pixels wide and high."""
        if not isinstance(path, str):
            raise UserError(f"{name} is missing. Upload a picture, or choose one of the examples.")
        try:
            return self._reduced(load_image(path, max_pixels=self.decoded))
        except ValueError as error:
            reason = str(error).replace(str(path), "the file")
            raise UserError(f"{name} cannot be read as a picture: {reason}. Use a PNG, JPEG or WebP file.") from error

    def depth(self, path: object, name: str) -> np.ndarray:
        """The uploaded depth map, float32 (H, W) in metres."""
        pixels = self.picture(path, name)  # refuses files that are no picture or too large
        try:
            depth = load_depth_png(str(path))
        except ValueError as error:
            raise UserError(f"{name} is no depth map: {error}. Use a 16-bit grey PNG in millimetres.") from error
        if depth.shape != pixels.shape[:2]:
            raise UserError(
                f"{name} has {depth.shape[1]} x {depth.shape[0]} pixels; depth maps may have {self.side} along a side."
            )
        return depth

    def fitting(self, pipe: Pipeline, picture: np.ndarray) -> np.ndarray:
        """The picture, reduced until its tiles are at most `pieces`."""
        while (num := len(pipe.task.pieces(picture).values)) > self.pieces:
            share = min(0.9, (self.pieces / num) ** 0.5)
            picture = resize_image(
                picture, (max(1, int(picture.shape[0] * share)), max(1, int(picture.shape[1] * share)))
            )
        return picture

    def _reduced(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if max(height, width) > MAX_RATIO * min(height, width):
            raise UserError(
                f"A picture of {width} x {height} pixels is too narrow: its longer side may be {MAX_RATIO} times as "
                "long as the other. Crop it."
            )
        share = self.side / max(height, width)
        if share >= 1:
            return picture
        return resize_image(picture, (max(1, round(height * share)), max(1, round(width * share))))


def number(value: object, name: str, low: float, high: float) -> float:
    """A number within its bounds, both included. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}.")
    return float(value)


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number within its bounds, both included. Raises UserError for anything else."""
    checked = number(value, name, low, high)
    if checked != int(checked):
        raise UserError(f"{name} must be a whole number from {low} to {high}.")
    return int(checked)


def choice(value: object, name: str, known: list[str]) -> str:
    """One of the known words. Raises UserError for anything else."""
    if value not in known:
        raise unknown_name(name, str(value)[:60], known)
    return str(value)
