"""Depth estimation: RGB -> metric depth, in pixel space (CrossFlow section 5.3).

An image variational encoder maps 3 x H x W to 1 x H x W; the flow leads from there to the depth map, in logarithm by
default.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Source
from crossflow.core.config import Config, Section
from crossflow.core.files import write_array
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.dataset import Examples
from crossflow.data.images import load_depth_png, load_image, save_depth_png, save_png, to_tensor
from crossflow.data.item import Item
from crossflow.data.sheet import colour_depth
from crossflow.data.tiles import by_shape, fit_shorter_side, fitted_sides
from crossflow.tasks.base import Case, Example, Flow, Pieces, Report, Task, Tile
from crossflow.tasks.depth.dataset import Augmentation, coloured, example, square
from crossflow.tasks.depth.decoder import DepthScale, DepthTarget
from crossflow.tasks.depth.encoder import build_reconstructor, build_trunk

FARTHEST_PNG = 65.535
"""Metres."""


class DepthSettings(Section):
    target: DepthTarget = "log"
    """What the flow predicts: log | linear | disparity."""
    near: float = Field(0.1, gt=0)
    """Metres; nearer measurements count as missing."""
    far: float = Field(100.0, gt=0)
    """Metres; farther measurements count as missing."""
    alignment: Literal["none", "median", "affine"] = "none"
    """How predictions are aligned before they are scored: none | median | affine."""
    crop: Literal["none", "eigen", "garg", "nyu"] = "none"
    """The part of a picture that is scored."""
    augmentation: Augmentation = Augmentation()


class DepthConfig(Config):
    depth: DepthSettings = DepthSettings()


class Adapter(Task[DepthConfig]):
    name = "depth"
    Config = DepthConfig
    needs = frozenset({"image", "depth"})
    input_kind = "image"
    headline = ("abs_rel", "rmse", "delta1")

    scale: DepthScale

    # -- what is learned before the flow

    def prepare(self, examples: Examples, report: Report) -> None:
        settings = self.config.depth
        depths = [one["depth"] for one in examples.first(256)]
        self.scale = DepthScale.fit(settings.target, settings.near, settings.far, depths)
        report(f"{settings.target} depth: mean {self.scale.shift:.3f}, standard deviation {self.scale.scale:.3f}")

    def save(self, folder: Path) -> None:
        self.scale.save(folder)

    def load(self, folder: Path) -> None:
        self.scale = DepthScale.load(folder)

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (1, self.config.data.image_size, self.config.data.image_size)

    def build_model(self) -> CrossFlow:
        config = self.config
        gaussian = config.source.kind == "gaussian"
        trunk = None if gaussian else build_trunk(config.source, config.backbone, config.data.image_size)
        source = SourceEncoder(trunk, config.source.kind, self.latent_shape, config.source.noise_scale)
        return CrossFlow(source, build_backbone(config.backbone, self.latent_shape, grid_channels=3 if gaussian else 0))

    def build_objective(self, model: CrossFlow) -> Objective:
        return Objective(model, self.config, reconstructor=build_reconstructor())

    # -- data

    def transform(self, item: Item, generator: np.random.Generator) -> Example:
        return example(item, self.config.data.image_size, self.config.depth.augmentation, generator)

    def batch(self, examples: Sequence[Example]) -> Batch:
        factors = torch.stack([one["colour"] for one in examples])
        rgb = coloured(torch.stack([one["rgb"] for one in examples]), factors)
        depth = torch.stack([one["depth"] for one in examples])
        source = self._source(rgb)
        return Batch(
            features=source.features,
            target=self.scale.encode(depth),
            weight=self.scale.valid(depth).float(),
            condition=source.condition,
            alignment=rgb,
            ids=tuple(one["id"] for one in examples),
        )

    def _source(self, rgb: Tensor) -> Source:
        return Source(rgb, condition=Condition(grid=rgb) if self.config.source.kind == "gaussian" else None)

    # -- sampling

    def source(self, inputs: Sequence[np.ndarray]) -> Source:
        return self._source(torch.stack([to_tensor(image) for image in inputs]))

    def decode(self, z1: Tensor) -> list[np.ndarray]:
        """Depth maps float32 (H, W) in metres."""
        return [depth.numpy() for depth in self.scale.decode(z1)[:, 0].cpu()]

    def run(self, inputs: Sequence[np.ndarray], flow: Flow, ids: Sequence[str]) -> list[np.ndarray]:
        """Pictures of any size: the shorter side is brought to the model's, the depth map back to the picture's
        size.
        """
        cut = [self.pieces(image) for image in inputs]
        depths = by_shape(
            [pieces.values[0] for pieces in cut],
            ids,
            lambda images, names: self.decode(flow(self.source(images), names)),
        )
        return [pieces.join([depth]) for pieces, depth in zip(cut, depths, strict=True)]

    def read_input(self, value: str | Path | np.ndarray) -> np.ndarray:
        return value if isinstance(value, np.ndarray) else load_image(value)

    def pieces(self, value: np.ndarray) -> Pieces:
        fitted = fit_shorter_side(value, self.config.data.image_size, self.config.backbone.grain)
        return Pieces([fitted], lambda depths: _resize_depth(depths[0], value.shape[:2]), fitted.shape[:2])

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """A depth map in metres, or a 16-bit PNG of one in millimetres; missing depth takes the mean."""
        depth = value if isinstance(value, np.ndarray) else load_depth_png(value)
        sides = fitted_sides(depth.shape, self.config.data.image_size, self.config.backbone.grain)
        rows, columns = (
            ((np.arange(side) + 0.5) * length / side).astype(np.int64)
            for side, length in zip(sides, depth.shape, strict=True)
        )
        fitted = torch.from_numpy(depth[rows[:, None], columns].astype(np.float32))
        z1 = self.scale.encode(fitted[None, None])
        return Pieces(list(z1), lambda depths: _resize_depth(depths[0], depth.shape), sides)

    def pictures(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """In colours, with one scale for all."""
        near, far = min(depth.min() for depth in outputs), max(depth.max() for depth in outputs)
        return [colour_depth(depth, near=float(near), far=float(far)) for depth in outputs]

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Millimetres as 16-bit PNG, metres as .npy, and a coloured picture.

        What is farther than 65.535 m, where 16 bits end, is 0 in the PNG, "not measured"; the .npy has it.
        """
        representable = np.where(output <= FARTHEST_PNG, output, 0)
        millimetres = save_depth_png(representable, stem.with_name(f"{stem.name}_depth_mm.png"), metadata=metadata)
        metres = write_array(stem.with_name(f"{stem.name}_depth.npy"), output)
        return [millimetres, metres, save_png(colour_depth(output), stem.with_name(f"{stem.name}_depth.png"), metadata)]

    # -- scoring

    def case(self, item: Item) -> Case:
        image, depth = square(item, self.config.data.image_size)
        return Case(item.id, image, np.where(self._scorable(depth), depth, 0), item)

    def _scorable(self, depth: np.ndarray) -> np.ndarray:
        return (depth >= self.config.depth.near) & (depth <= self.config.depth.far)

    def metric(self, thorough: bool = False) -> TaskMetric:
        from crossflow.tasks.depth.metric import DepthMetric

        settings = self.config.depth
        return DepthMetric(
            alignment=settings.alignment, crop=settings.crop, min_depth=settings.near, max_depth=settings.far
        )

    def baseline(self, train: Examples, cases: Iterable[Case]) -> dict[str, float]:
        """The per-pixel median of the training depth maps, the same for every picture."""
        depths = [square(item, self.config.data.image_size)[1] for item in train.items(1000)]
        stack = np.stack([np.where(self._scorable(depth), depth, np.nan) for depth in depths])
        everywhere = np.nanmedian(stack)
        missing = np.isnan(stack).all(axis=0)
        median = np.where(missing, everywhere, np.nanmedian(np.where(missing, everywhere, stack), axis=0))
        metric = self.metric()
        for case in cases:
            metric.add(case.id, median.astype(np.float32), case.truth)
        return metric.compute()

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        measured = case.truth[case.truth > 0]
        near, far = (float(measured.min()), float(measured.max())) if len(measured) else (None, None)
        return [
            Tile(case.input, "picture"),
            Tile(colour_depth(output, near=near, far=far), "estimate"),
            Tile(colour_depth(case.truth, near=near, far=far), "truth"),
        ]


def _resize_depth(depth: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if depth.shape == tuple(shape):
        return depth
    return F.interpolate(torch.from_numpy(depth)[None, None], size=tuple(shape), mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()
