"""Outputs of a trained model as PIL images, arrays or tensors.

H W height and width in pixels, P pieces (tiles) of an output.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossflow.core.errors import UserError, unknown_name

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class Outputs(Sequence[Any]):
    """The outputs of a model in the order of its inputs; indexed and iterated like a list.

        pictures = pipe(["a red cube", "a blue sphere"])
        pictures[0].save("cube.png")
        pictures.images, pictures.ids, pictures.seed

    Pictures are PIL images, or with `output_type` "np" arrays uint8 (H, W, 3), or with "pt" float32 tensors (3, H, W)
    in [0, 1]. Depth maps are float32 (H, W) in metres, as arrays or, with "pt", tensors. Captions are texts.
    """

    raw: tuple[Any, ...] = field(repr=False)
    """The outputs as the task makes them: uint8 (H, W, 3), float32 (H, W), or str."""
    render: Callable[[Sequence[Any]], list[np.ndarray]] = field(repr=False)
    """Raw outputs -> pictures uint8 (H, W, 3), on a common scale of colours."""
    seed: int = 0
    ids: tuple[str, ...] = ()
    """The keys of the noise: `pipe(input, ids=[id], seed=seed)` reproduces an output."""
    output_type: str = "pil"
    latents: tuple[Tensor, ...] | None = field(default=None, repr=False)
    """The latents z1 (P, *latent) of each output, on request."""

    def __post_init__(self) -> None:
        check_output_type(self.output_type)

    @property
    def images(self) -> list[Any]:
        """The outputs as pictures, depth maps in colours on a common scale. Raises UserError for captions."""
        if self.raw and isinstance(self.raw[0], str):
            raise UserError("This model makes captions, not images: read .captions.")
        return [self._picture(pixels) for pixels in self.render(self.raw)]

    @property
    def depth(self) -> list[Any]:
        """The depth maps, float32 (H, W) in metres. Raises UserError for other outputs."""
        if any(isinstance(value, str) or value.ndim != 2 for value in self.raw):
            raise UserError("This model makes no depth maps: read .images or .captions.")
        return list(self)

    @property
    def captions(self) -> list[str]:
        """The captions. Raises UserError for other outputs."""
        if not all(isinstance(value, str) for value in self.raw):
            raise UserError("This model makes no captions: read .images.")
        return list(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._convert(value) for value in self.raw[index]]
        return self._convert(self.raw[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._convert, self.raw)

    def _convert(self, value: str | np.ndarray) -> Any:
        if isinstance(value, str):
            return value
        if value.ndim == 2:
            return torch.from_numpy(value) if self.output_type == "pt" else value
        return self._picture(value)

    def _picture(self, pixels: np.ndarray) -> Any:
        if self.output_type == "np":
            return pixels
        if self.output_type == "pil":
            return Image.fromarray(pixels)
        return torch.from_numpy(pixels).movedim(-1, 0).float() / 255


def check_output_type(name: str) -> None:
    """Raises UserError for an unknown output type."""
    if name not in OUTPUT_TYPES:
        raise unknown_name("output type", name, OUTPUT_TYPES)
