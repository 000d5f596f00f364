"""Text-to-image: a prompt's latent flows to a picture's (CrossFlow sections 4 and 5.1)."""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Source
from crossflow.core.config import Config, Section
from crossflow.core.errors import UserError
from crossflow.core.files import write_json
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.noise import key
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import CachedBatch, cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import (
    FOLDER,
    CodecSettings,
    assumed_shape,
    encode,
    first_pictures,
    latents,
    open_codec,
    read_codec,
    unscaled_codec,
)
from crossflow.data.images import load_image, save_png, to_tensor
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.networks.alignment import EmbeddingHead, PictureHead
from crossflow.networks.codecs.base import Codec
from crossflow.networks.image_tower import ImageTower, TowerSettings
from crossflow.networks.text.variational import Adaptor
from crossflow.tasks.base import Case, Example, Pieces, Report, Task, Tile
from crossflow.tasks.t2i.decoder import decode
from crossflow.tasks.t2i.encoder import TextSettings, TextSide
from crossflow.tasks.t2i.objective import TextToImageObjective

TOWER_FILE = "image_tower.json"


class T2ISettings(Section):
    clip: str | None = None
    """Hub id or folder of a CLIP model for the CLIP score; none: pictures of other data than scenes are not scored."""
    first_caption: float = Field(0.0, ge=0, le=1)
    """Chance that training takes an item's first caption, and otherwise one of all. In scenes the first is short, as
    prompts are, and often leaves the colours open.
    """


class T2IConfig(Config):
    text: TextSettings = TextSettings()
    codec: CodecSettings = CodecSettings()
    tower: TowerSettings = TowerSettings()
    t2i: T2ISettings = T2ISettings()


class Adapter(Task[T2IConfig]):
    name = "t2i"
    Config = T2IConfig
    needs = frozenset({"image", "captions"})
    reads_features = True
    input_kind = "text"
    headline = ("overall", "single_object", "colors", "two_objects")

    text: TextSide
    codec: Codec
    assumed_shape: tuple[int, ...] | None = None
    tower_checksum: str | None = None
    """Of the frozen image tower that the run was begun with."""

    def __init__(self, config: T2IConfig) -> None:
        super().__init__(config)
        loss = config.loss
        if loss.encoder != "none" and loss.encoder_target not in ("image", "text", "tokens"):
            raise UserError(
                f"loss.encoder_target = {loss.encoder_target!r} is not possible for t2i; it is image, text or tokens."
            )

    # -- what is learned before the flow

    def prepare(self, examples: Examples, report: Report) -> None:
        self.text = TextSide.prepare(self.config.text, examples.captions(20_000))
        self.codec = open_codec(self.config.codec, first_pictures(examples, self.config))
        if self._needs_tower:
            self.tower_checksum = self.tower.checksum
            report(f"image tower: {self.config.tower.source}, weights sha256 {self.tower_checksum[:16]}")
        if self.text.tokenizer is not None:
            report(
                f"tokenizer: {len(self.text.tokenizer)} tokens; codec: {self.config.codec.kind}, "
                f"latent {self.latent_shape}"
            )

    def save(self, folder: Path) -> None:
        self.text.save(folder)
        self.codec.save(folder / FOLDER)
        if self.tower_checksum is not None:
            write_json(folder / TOWER_FILE, {"source": self.config.tower.source, "checksum": self.tower_checksum})

    def load(self, folder: Path) -> None:
        self.text = TextSide.load(self.config.text, folder)
        self.codec = read_codec(folder, self.config.codec)
        if (folder / TOWER_FILE).is_file():
            self.tower_checksum = json.loads((folder / TOWER_FILE).read_text(encoding="utf-8"))["checksum"]

    def open_frozen(self) -> None:
        self.text = TextSide.prepare(self.config.text, ()) if self.config.text.frozen else TextSide(self.config.text)
        self.codec = unscaled_codec(self.config.codec)

    def extractor(self, options: Options) -> Extractor:
        aligned = self._aligned_with
        looks_at_padding = aligned == "tokens" or self.config.source.trunk == "released"
        return Extractor(
            options,
            codec=self.codec,
            text=self.text.frozen,
            pooled=aligned == "vector",
            keep_padding=looks_at_padding and self.config.text.padding == "features",
            pixels=aligned == "image" and not self._needs_tower,
            tower=self.tower if self._needs_tower and options.images else None,
        )

    def assume(self) -> None:
        self.text = TextSide(self.config.text)
        self.assumed_shape = assumed_shape(self.config.codec, self.config.data.image_size)

    @property
    def _aligned_with(self) -> str:
        """What the encoder loss compares z0 with: nothing | image | vector (one per text) | tokens | words.

        Only the contrastive losses can look at the picture: a source is reconstructed to the text it came from.
        """
        loss = self.config.loss
        if loss.encoder == "none" or self.config.source.kind == "gaussian":
            return "nothing"
        if loss.encoder_target == "tokens":
            return "tokens"
        if loss.encoder == "reconstruction":
            return "words"
        return "image" if loss.encoder_target == "image" else "vector"

    @property
    def _needs_tower(self) -> bool:
        return self._aligned_with == "image" and self.config.tower.frozen

    @functools.cached_property
    def tower(self) -> ImageTower:
        """The frozen image tower; loaded by the first training batch, never for sampling."""
        return ImageTower.load(self.config.tower, self.tower_checksum)

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        if self.assumed_shape is not None:
            return self.assumed_shape
        return self.codec.latent_shape(self.config.data.image_size)

    def build_model(self) -> CrossFlow:
        config, shape = self.config, self.latent_shape
        if config.source.kind == "gaussian":
            source = SourceEncoder(None, "gaussian", shape)
            backbone = build_backbone(config.backbone, shape, context_dim=config.source.width)
            return CrossFlow(source, backbone, self.text.build_condition_encoder(config.source))
        trunk = self.text.build_trunk(config.source, shape)
        return CrossFlow(
            SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale),
            build_backbone(config.backbone, shape),
        )

    def build_objective(self, model: CrossFlow) -> Objective:
        return TextToImageObjective(
            model,
            self.config,
            alignment_head=self._alignment_head(),
            reconstructor=self.text.build_reconstructor(self.latent_shape),
        )

    def _alignment_head(self) -> nn.Module:
        """What turns `Batch.alignment` into z_hat."""
        shape, tower = self.latent_shape, self.config.tower
        target = self.config.loss.encoder_target
        if target == "tokens":
            return self.text.build_token_head(shape)
        if target == "text":
            return self.text.build_alignment_head(math.prod(shape))
        if not tower.frozen:
            return PictureHead(3, math.prod(shape))
        width = tower.width if tower.width is not None else self.tower.width
        if tower.head == "mlp":
            return EmbeddingHead(width, math.prod(shape))
        if len(shape) != 3:
            raise UserError(f"tower.head = adaptor makes latents (C, H, W), not {shape}; use mlp.")
        return Adaptor(width, *shape)

    # -- data

    def transform(self, item: Item, generator: np.random.Generator) -> Example:
        return captioned_example(
            item, self.config.data.image_size, generator, first_caption=self.config.t2i.first_caption
        )

    def batch(self, examples: Sequence[Example]) -> Batch:
        texts = [one["caption"] for one in examples]
        cached = cached_batch(examples, self.config.data.image_size)
        reads_cache = cached is not None and self.text.frozen is not None
        source = self._as_source(*(cached.text() if cached and reads_cache else self.text.features(texts)))
        return Batch(
            features=source.features,
            mask=source.mask,
            target=latents(self.codec, examples, cached),
            condition=source.condition,
            alignment=self._alignment(source.features, texts, examples, cached),
            ids=tuple(one["id"] for one in examples),
        )

    def _alignment(
        self, features: Tensor, texts: Sequence[str], examples: Sequence[Example], cached: CachedBatch | None
    ) -> Tensor | None:
        """What the encoder loss compares z0 with."""
        aligned = self._aligned_with
        if aligned == "nothing":
            return None
        if aligned == "tokens":
            return features
        if aligned == "image":
            if self._needs_tower and cached is not None:
                return cached.tower()
            images = cached.pixels() if cached is not None else torch.stack([one["image"] for one in examples])
            return self.tower(images) if self._needs_tower else images
        if aligned == "vector" and cached is not None and self.text.frozen is not None:
            return cached.pooled()
        return self.text.alignment(features, texts, reconstruct=aligned == "words")

    # -- sampling

    def source(self, inputs: Sequence[str]) -> Source:
        return self._as_source(*self.text.features(inputs))

    def _as_source(self, features: Tensor, mask: Tensor) -> Source:
        condition = Condition(tokens=features, mask=mask) if self.config.source.kind == "gaussian" else None
        return Source(features, mask, condition)

    @property
    def decodes_features(self) -> bool:  # type: ignore[override]
        return self.codec.reads_text

    def decode(self, z1: Tensor) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3); a codec that is guided by texts decodes under that of an empty one."""
        if not self.codec.reads_text:
            return decode(self.codec, z1)
        return self.decode_with(z1, self.text.features([""])[0].expand(len(z1), -1, -1))

    def decode_with(self, z1: Tensor, features: Tensor) -> list[np.ndarray]:
        return decode(self.codec, z1, features)

    def read_input(self, value: str | Path | np.ndarray) -> str:
        if not isinstance(value, str):
            raise UserError(f"A text-to-image model takes prompts; {type(value).__name__} came.")
        # Half a character, as a shell passes on bytes of another encoding: no key, token or file can hold it.
        return value.encode("utf-8", "replace").decode("utf-8")

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        image = value if isinstance(value, np.ndarray) else load_image(value)
        return Pieces(list(encode(self.codec, to_tensor(center_crop_resize(image, self.config.data.image_size))[None])))

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        return [save_png(output, stem.with_name(f"{stem.name}.png"), metadata)]

    # -- scoring

    def cases(self, examples: Examples, limit: int) -> list[Case]:
        """On scenes: prompts of the six GenEval kinds, as many of each. Elsewhere: the first caption of each item."""
        if "scene" in examples.reader.fields:
            from crossflow.tasks.t2i.metric import scene_cases

            # The prompts of a kind are few; their order and their noise differ between splits.
            split = examples.reader.split
            found = scene_cases(limit, key("prompts", split, self.config.seed))
            return [Case(f"{split}/{id}", prompt.text, prompt) for id, prompt in found]
        return super().cases(examples, limit)

    def case(self, item: Item) -> Case:
        return Case(item.id, item.captions[0], item.captions[0], item)

    def metric(self, thorough: bool = False) -> TaskMetric:
        from crossflow.tasks.t2i.metric import T2IMetric

        return T2IMetric(clip=self.config.t2i.clip, seed=self.config.seed)

    def baseline(self, train: Examples, cases: Iterable[Case]) -> dict[str, float]:
        return {}  # the metric carries its own control, the same pictures judged by shuffled prompts

    def tiles(self, case: Case, output: np.ndarray) -> list[Tile]:
        tiles = [Tile(output, case.input)]
        if case.item is not None and case.item.image is not None:
            tiles.append(Tile(center_crop_resize(case.item.image, self.config.data.image_size), "truth"))
        return tiles
