"""Tasks whose input is a picture and whose latents are a picture's: pixel latents, sources, sizes, files.

A picture of any size is brought to the model's size (shorter side, whole patches), and its output back; a task may
cut it into tiles instead. With a Gaussian source the picture is concatenated to z_t as a grid.
B batch, C channels, H W height width.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Source
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.dataset import Examples
from crossflow.data.images import load_image, save_png, to_tensor, to_uint8
from crossflow.data.tiles import fit_shorter_side, resize_image
from crossflow.networks.codecs.pixel import PixelCodec
from crossflow.networks.codecs.registry import load_codec
from crossflow.networks.trunks import Reconstructor
from crossflow.tasks.base import C, P, Parts, Pieces, Report, Task

NUM_MEASURED = 256
"""Training examples that scales are measured on."""
CODEC_FOLDER = "codec"


@dataclass(frozen=True)
class PixelParts(Parts[Config]):
    """The mean and spread of the target pictures' pixels, measured on the training data."""

    codec: PixelCodec

    @classmethod
    def learn(cls, config: Config, examples: Examples, report: Report) -> Self:
        """Measures the pixels of the first training targets."""
        targets = torch.stack([example["target"] for example in examples.first(NUM_MEASURED)])
        codec = PixelCodec(3)
        codec.fit_scale([targets])
        report(f"pixels: mean {codec.shift.mean():.3f}, standard deviation {(1 / codec.scale).mean():.3f}")
        return cls(codec)

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """Reads the codec. Raises UserError for a codec of another kind."""
        codec = load_codec(folder / CODEC_FOLDER)
        if not isinstance(codec, PixelCodec):
            raise UserError(f"{folder / CODEC_FOLDER} holds a codec of the kind {codec.kind!r}; expected pixel.")
        return cls(codec)

    def save(self, folder: Path) -> None:
        """Writes the codec."""
        self.codec.save(folder / CODEC_FOLDER)

    @classmethod
    def outline(cls, config: Config) -> Self:
        """A codec whose scale is not measured."""
        return cls(PixelCodec(3))


PP = TypeVar("PP", bound=PixelParts)


class PictureTask(Task[C, P]):
    """A task from a picture. A subclass writes `transform` ({"id", "source" (C, H, W), "target"}), `build_trunk`,
    `batch`, `decode` and `target`; or extends `PixelTask`, which has all but the first two.
    """

    input_kind = "image"
    source_channels: ClassVar[int] = 3

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(3, data.image_size, data.image_size)."""
        return (3, self.config.data.image_size, self.config.data.image_size)

    @abstractmethod
    def build_trunk(self) -> nn.Module:
        """The network of the source encoder: features (B, C, H, W) -> (B, 2, *latent), any H and W of whole patches."""

    def build_model(self) -> CrossFlow:
        """The trunk in core's source encoder, and the backbone; a Gaussian source has no trunk."""
        config, shape = self.config, self.latent_shape
        is_gaussian = config.source.kind == "gaussian"
        trunk = None if is_gaussian else self.build_trunk()
        source = SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale)
        grid_channels = self.source_channels if is_gaussian else 0
        return CrossFlow(source, build_backbone(config.backbone, shape, grid_channels=grid_channels))

    def build_objective(self, model: CrossFlow) -> Objective:
        """The flow loss, and the reconstruction of the source picture from z0 where loss.encoder asks for it."""
        return Objective(model, self.config, reconstructor=Reconstructor(self.latent_shape[0], self.source_channels))

    def source(self, values: Sequence[np.ndarray]) -> Source:
        """Pictures uint8 (H, W, 3) of one size."""
        return self.as_source(to_tensors(values))

    def as_source(self, pixels: Tensor) -> Source:
        """Pictures (B, 3, H, W) in [-1, 1] as features, and for a Gaussian source also as its condition."""
        is_gaussian = self.config.source.kind == "gaussian"
        return Source(pixels, condition=Condition(grid=pixels) if is_gaussian else None)

    def pieces(self, value: np.ndarray) -> Pieces:
        """The picture with its shorter side at data.image_size; outputs are brought back to the picture's size."""
        fitted = fit_shorter_side(value, self.config.data.image_size, self.config.backbone.grain)
        return Pieces([fitted], lambda outputs: self.resize(outputs[0], value.shape[:2]), fitted.shape[:2])

    def resize(self, output: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An output at the height and width of its input."""
        return resize_image(output, (shape[0], shape[1]))

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes a picture uint8 (H, W, 3) as PNG."""
        return [save_png(output, stem.with_name(f"{stem.name}.png"), metadata)]


class PixelTask(PictureTask[C, PP]):
    """A task from picture to picture in pixel space: latents are pixels scaled to unit variance."""

    Parts = PixelParts

    def as_source(self, pixels: Tensor) -> Source:
        """Pictures (B, 3, H, W) in [-1, 1] as scaled pixels."""
        return super().as_source(self.parts.codec.encode(pixels).mean)

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Examples {"id", "source", "target"}: both pictures as scaled pixels."""
        source = self.as_source(torch.stack([example["source"] for example in examples]))
        return Batch(
            features=source.features,
            target=self.parts.codec.encode(torch.stack([example["target"] for example in examples])).mean,
            condition=source.condition,
            alignment=source.features,
            ids=tuple(example["id"] for example in examples),
        )

    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3)."""
        return list(to_uint8(self.parts.codec.decode(z1)))

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """A finished picture uint8 (H, W, 3), or the path of one, as scaled pixels."""
        pieces = self.pieces(as_picture(value))
        latents = self.parts.codec.encode(to_tensors(pieces.values)).mean
        return Pieces(list(latents), pieces.join, pieces.layout, pieces.numbered)


def to_tensors(images: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 (H, W, 3) of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def as_picture(value: str | Path | np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, 3), read where `value` is a path."""
    return value if isinstance(value, np.ndarray) else load_image(value)
