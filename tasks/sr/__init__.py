"""Super-resolution: a picture enlarged by bicubic interpolation -> a sharp one (CrossFlow section 5.4).

The enlarged picture is itself the source z0; the flow adds what it lacks. Any scale factor, pictures of any size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Source
from crossflow.core.config import Config, Section, SourceConfig
from crossflow.core.errors import UserError
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.dataset import Examples
from crossflow.data.images import load_image, save_png
from crossflow.data.item import Item
from crossflow.data.tiles import Tiles
from crossflow.networks.codecs.pixel import PixelCodec
from crossflow.networks.codecs.registry import load_codec
from crossflow.networks.trunks import Reconstructor
from crossflow.tasks.base import Case, Example, Flow, Pieces, Report, Task, Tile
from crossflow.tasks.sr.dataset import enlarge, example, reduce, to_multiple
from crossflow.tasks.sr.decoder import decode, pictures
from crossflow.tasks.sr.encoder import build_trunk

LARGEST_DENOMINATOR = 10  # crops and tiles are multiples of the scale's numerator


class SrSettings(Section):
    scale: int | float = Field(4, gt=1, le=16)
    """Factor between the low and the high resolution: whole, or a ratio of small numbers such as 1.5."""
    crop: int | None = Field(None, ge=8)
    """Side of the training crops in pixels of the high resolution; none: data.image_size."""
    tile: int = Field(128, ge=8)
    """Side of the tiles a large picture is cut into, in pixels of the high resolution."""
    overlap: int = Field(16, ge=0)
    """Pixels that neighbouring tiles share at least."""

    @model_validator(mode="after")
    def _is_a_ratio(self) -> "SrSettings":
        if abs(self.ratio - Fraction(self.scale)) > 1e-3:
            raise ValueError(f"scale = {self.scale} is no ratio of small numbers; {float(self.ratio):.6g} is near")
        return self

    @property
    def ratio(self) -> Fraction:
        """The scale in lowest terms."""
        return Fraction(self.scale).limit_denominator(LARGEST_DENOMINATOR)


class SrConfig(Config):
    source: SourceConfig = SourceConfig(kind="deterministic")
    sr: SrSettings = SrSettings()


class Adapter(Task[SrConfig]):
    name = "sr"
    Config = SrConfig
    needs = frozenset({"image"})
    input_kind = "image"
    headline = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")

    codec: PixelCodec

    def __init__(self, config: SrConfig) -> None:
        super().__init__(config)
        self.scale, patch = config.sr.ratio, config.backbone.grain
        unit = self.scale.numerator
        said = f"{unit} (sr.scale = {self.scale})" if self.scale.denominator > 1 else f"sr.scale = {unit}"
        self.crop = config.sr.crop or config.data.image_size
        if self.crop % unit or self.crop % patch:
            raise UserError(
                f"The training crop of {self.crop} pixels (sr.crop, or data.image_size) must be a multiple of "
                f"{said} and of the backbone's patches of {patch}."
            )
        self.grain = math.lcm(unit, patch)
        if config.sr.tile % self.grain or config.sr.tile - config.sr.overlap < self.grain:
            raise UserError(
                f"sr.tile = {config.sr.tile} must be a multiple of {said} and of the backbone's patches of "
                f"{patch}, and larger than sr.overlap = {config.sr.overlap} by {self.grain} at least."
            )

    # -- what is learned before the flow

    def prepare(self, examples: Examples, report: Report) -> None:
        sharp = torch.stack([one["sharp"] for one in examples.first(256)])
        self.codec = PixelCodec(3)
        self.codec.fit_scale([sharp])
        report(f"pixels: mean {self.codec.shift.mean():.3f}, standard deviation {(1 / self.codec.scale).mean():.3f}")

    def save(self, folder: Path) -> None:
        self.codec.save(folder / "codec")

    def load(self, folder: Path) -> None:
        codec = load_codec(folder / "codec")
        assert isinstance(codec, PixelCodec)
        self.codec = codec

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (3, self.crop, self.crop)

    def build_model(self) -> CrossFlow:
        config = self.config
        gaussian = config.source.kind == "gaussian"
        source = SourceEncoder(
            build_trunk(config.source.kind), config.source.kind, self.latent_shape, config.source.noise_scale
        )
        return CrossFlow(source, build_backbone(config.backbone, self.latent_shape, grid_channels=3 if gaussian else 0))

    def build_objective(self, model: CrossFlow) -> Objective:
        return Objective(model, self.config, reconstructor=Reconstructor(3, 3))

    # -- data

    def transform(self, item: Item, generator: np.random.Generator) -> Example:
        return example(item, self.crop, self.scale, generator)

    def batch(self, examples: Sequence[Example]) -> Batch:
        source = self._source(torch.stack([one["bicubic"] for one in examples]))
        target = self.codec.encode(torch.stack([one["sharp"] for one in examples])).mean
        ids = tuple(one["id"] for one in examples)
        return Batch(source.features, target, condition=source.condition, alignment=source.features, ids=ids)

    def _source(self, bicubic: Tensor) -> Source:
        features = self.codec.encode(bicubic).mean
        return Source(features, condition=Condition(grid=features) if self.config.source.kind == "gaussian" else None)

    # -- sampling

    def source(self, inputs: Sequence[np.ndarray]) -> Source:
        """inputs: enlarged pictures of one size, uint8 (H, W, 3)."""
        return self._source(pictures(inputs))

    def decode(self, z1: Tensor) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3)."""
        return decode(self.codec, z1)

    def run(self, inputs: Sequence[np.ndarray], flow: Flow, ids: Sequence[str]) -> list[np.ndarray]:
        """Low-resolution pictures of any size uint8 (h, w, 3) -> (h scale, w scale, 3), in overlapped tiles."""
        outputs = []
        for image, name in zip(inputs, ids, strict=True):
            pieces = self.pieces(image)
            names = [f"{name}#{i}" for i in range(len(pieces.values))]
            outputs.append(pieces.join(self.decode(flow(self.source(pieces.values), names))))
        return outputs

    def read_input(self, value: str | Path | np.ndarray) -> np.ndarray:
        return value if isinstance(value, np.ndarray) else load_image(value)

    def pieces(self, value: np.ndarray) -> Pieces:
        """Tiles of the enlarged picture."""
        return self._cut(enlarge(value, self.scale))

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        tiles = self._cut(self.read_input(value))
        return replace(tiles, values=list(self.codec.encode(pictures(tiles.values)).mean))

    def _cut(self, image: np.ndarray) -> Pieces:
        # Tiles start on the grid of the low resolution, because the source repeats with its pixels.
        tiles = Tiles.of(image, self.config.sr.tile, self.config.sr.overlap, self.grain)
        return Pieces(tiles.pieces, tiles.join, tiles.shape)

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        return [save_png(output, stem.with_name(f"{stem.name}_x{self.config.sr.scale}.png"), metadata)]

    # -- scoring

    @property
    def _smallest(self) -> int:
        """Side below which nothing is left for SSIM's 11 x 11 window inside the shaved border."""
        return 11 + 2 * math.ceil(self.scale)

    def cases(self, examples: Examples, limit: int) -> list[Case]:
        cases = super().cases(examples, limit)
        if not cases:
            raise UserError(
                f"No picture of {examples.reader.spec} is at least {self._smallest} "
                "pixels wide and high, so none can be scored."
            )
        return cases

    def case(self, item: Item) -> Case | None:
        assert item.image is not None
        sharp = to_multiple(item.image, self.scale)
        if min(sharp.shape[:2]) < self._smallest:
            return None
        return Case(item.id, reduce(sharp, self.scale), sharp[..., 0] if item.grey else sharp, item)

    def metric(self, thorough: bool = False) -> TaskMetric:
        from crossflow.tasks.sr.metric import SrMetric

        return SrMetric(scale=self.scale.numerator, shave=math.ceil(self.scale))

    def baseline(self, train: Examples, cases: Iterable[Case]) -> dict[str, float]:
        """Bicubic enlargement."""
        metric = self.metric()
        for case in cases:
            metric.add(case.id, enlarge(case.input, self.scale), case.truth)
        return metric.compute()

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        return [
            Tile(enlarge(case.input, self.scale), "bicubic"),
            Tile(output, "output"),
            Tile(case.truth if case.truth.ndim == 3 else np.stack([case.truth] * 3, axis=-1), "truth"),
        ]
