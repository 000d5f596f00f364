"""Depth estimation: RGB -> metric depth, in pixel space (CrossFlow section 5.3).

An image variational encoder maps 3 x H x W to 1 x H x W; the flow leads from there to the depth map, in logarithm by
default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.batch import Batch, Record
from crossflow.core.files import write_array
from crossflow.data.combined import Combination, combined_depth
from crossflow.data.dataset import Examples
from crossflow.data.images import load_depth_png, save_depth_png, save_png
from crossflow.data.item import Item
from crossflow.data.sheet import colour_depth
from crossflow.data.tiles import fitted_sides
from crossflow.tasks.base import NUM_MEASURED, Example, Parts, PictureTask, Pieces, Report
from crossflow.tasks.depth.config import DepthConfig
from crossflow.tasks.depth.dataset import coloured, example, plain
from crossflow.tasks.depth.decoder import DepthScale
from crossflow.tasks.depth.encoder import build_trunk
from crossflow.tasks.depth.losses import DepthLoss
from crossflow.tasks.depth.scoring import DepthScoring

FARTHEST_PNG = 65.535
"""Metres."""


@dataclass(frozen=True)
class DepthParts(Parts[DepthConfig]):
    """The scale between metric depth and latents, measured on the training data."""

    scale: DepthScale

    @classmethod
    def learn(cls, config: DepthConfig, examples: Examples, report: Report) -> Self:
        """Measures the scale on the depth of the first training examples."""
        settings = config.depth
        depths = [example["target"] for example in examples.first(NUM_MEASURED)]
        scale = DepthScale.fit(settings.target, settings.near, settings.far, depths)
        report(f"{settings.target} depth: mean {scale.shift:.3f}, standard deviation {scale.scale:.3f}")
        return cls(scale)

    @classmethod
    def load(cls, config: DepthConfig, folder: Path) -> Self:
        """Reads the scale. Raises UserError when its file is missing."""
        return cls(DepthScale.load(folder))

    def save(self, folder: Path) -> None:
        """Writes the scale as JSON."""
        self.scale.save(folder)

    @classmethod
    def outline(cls, config: DepthConfig) -> Self:
        """The scale of the settings before it is measured."""
        return cls(DepthScale(config.depth.target, config.depth.near, config.depth.far))


class Adapter(PictureTask[DepthConfig, DepthParts]):
    """Metric depth (H, W) in metres from a picture of any size."""

    name = "depth"
    hub_tag = "depth-estimation"
    Config = DepthConfig
    Parts = DepthParts
    Scoring = DepthScoring
    needs = frozenset({"image", "depth"})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(1, data.image_size, data.image_size)."""
        return (1, self.config.data.image_size, self.config.data.image_size)

    def build_trunk(self) -> nn.Module:
        """RGB (B, 3, H, W) -> (B, 2, 1, H, W)."""
        return build_trunk(self.config.source, self.config.backbone, self.config.data.image_size)

    @property
    def combination(self) -> Combination:
        """The median at each pixel."""
        return combined_depth

    def decoded_loss(self) -> nn.Module | None:
        """A loss of the depth in metres: abs_rel or affine; see `PictureTask.decoded_loss`."""
        name = self.config.loss.decoded
        return None if name == "none" else DepthLoss(self.parts.scale, name)

    # -- data

    @classmethod
    def transform(cls, config: DepthConfig, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        """A square of the picture and its depth; see `dataset.example` and `dataset.plain`."""
        size = config.data.image_size
        return example(item, size, config.depth.augmentation, generator) if augment else plain(item, size)

    def collate(self, examples: Sequence[Example]) -> Record:
        """Pictures with their colours changed, and depth in metres."""
        record = super().collate(examples)
        return record | {"source": coloured(record["source"], record.pop("colour"))}

    def batch(self, record: Record) -> Batch:
        """Pictures, depth as latents, and weight 0 where depth is not measured."""
        rgb, depth = record["source"], record["target"]
        scale, source = self.parts.scale, self.as_source(rgb)
        return Batch(
            features=source.features,
            target=scale.encode(depth),
            weight=scale.valid(depth).float(),
            condition=source.condition,
            alignment=rgb,
            ids=record["id"],
        )

    # -- sampling

    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[np.ndarray]:
        """Depth maps float32 (H, W) in metres."""
        return list(self.decoded(z1)[:, 0].cpu().numpy())

    def decoded(self, z1: Tensor, features: Tensor | None = None) -> Tensor:
        """Depth (B, 1, H, W) in metres."""
        return self.parts.scale.decode(z1)

    def resize(self, output: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A depth map at another height and width, bilinearly."""
        if output.shape == tuple(shape):
            return output
        depth = torch.from_numpy(output)[None, None]
        return F.interpolate(depth, size=tuple(shape), mode="bilinear", align_corners=False)[0, 0].numpy()

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """A depth map in metres, or a 16-bit PNG of one in millimetres; missing depth takes the mean."""
        depth = value if isinstance(value, np.ndarray) else load_depth_png(value)
        sides = fitted_sides(depth.shape, self.config.data.image_size, self.config.backbone.grain)
        rows, columns = (
            ((np.arange(side) + 0.5) * length / side).astype(np.int64)
            for side, length in zip(sides, depth.shape, strict=True)
        )
        fitted = torch.from_numpy(depth[rows[:, None], columns].astype(np.float32))
        z1 = self.parts.scale.encode(fitted[None, None].to(self.device))
        return Pieces(list(z1), lambda outputs: self.resize(outputs[0], depth.shape), sides)

    def pictures(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """In colours, with one scale for all."""
        near, far = min(depth.min() for depth in outputs), max(depth.max() for depth in outputs)
        return [colour_depth(depth, near=float(near), far=float(far)) for depth in outputs]

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Millimetres as 16-bit PNG, metres as .npy, and a coloured picture.

        Depth beyond 65.535 m, where 16 bits end, is 0 ("not measured") in the PNG; the .npy has it.
        """
        representable = np.where(output <= FARTHEST_PNG, output, 0)
        millimetres = save_depth_png(representable, stem.with_name(f"{stem.name}_depth_mm.png"), metadata=metadata)
        metres = write_array(stem.with_name(f"{stem.name}_depth.npy"), output)
        return [millimetres, metres, save_png(colour_depth(output), stem.with_name(f"{stem.name}_depth.png"), metadata)]
