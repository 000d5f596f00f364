"""Text-to-image: a prompt's latent flows to a picture's (CrossFlow sections 4 and 5.1)."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Record, Source
from crossflow.core.errors import UserError
from crossflow.core.files import write_json
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import (
    FOLDER,
    assumed_shape,
    collate_pictures,
    first_pictures,
    latents,
    open_codec,
    read_codec,
    unscaled_codec,
)
from crossflow.data.images import load_image, save_png, to_tensor, to_uint8
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.networks.alignment import EmbeddingHead, PictureHead
from crossflow.networks.codecs.base import Codec
from crossflow.networks.image_tower import ImageTower
from crossflow.networks.text.tokenizer import unknown_words
from crossflow.networks.text.variational import Adaptor
from crossflow.tasks.base import Example, Parts, Pieces, Report, Task
from crossflow.tasks.t2i.config import T2IConfig
from crossflow.tasks.t2i.encoder import TextSide
from crossflow.tasks.t2i.objective import TextToImageObjective
from crossflow.tasks.t2i.scoring import TextToImageScoring

TOWER_FILE = "image_tower.json"
NUM_FOR_TOKENIZER = 20_000
"""Items whose captions the tokenizer is built from."""


def aligned_with(config: T2IConfig) -> str:
    """What the encoder loss compares z0 with: nothing | image | vector (one per text) | tokens | words.

    Only the contrastive losses can look at the picture: a source is reconstructed to the text it came from.
    """
    loss = config.loss
    if loss.encoder == "none" or config.source.kind == "gaussian":
        return "nothing"
    if loss.encoder_target == "tokens":
        return "tokens"
    if loss.encoder == "reconstruction":
        return "words"
    return "image" if loss.encoder_target == "image" else "vector"


def needs_tower(config: T2IConfig) -> bool:
    """Whether z0 is aligned with the embedding of a frozen image tower."""
    return aligned_with(config) == "image" and config.tower.frozen


@dataclass(frozen=True)
class TextToImageParts(Parts[T2IConfig]):
    """How texts and pictures are read: tokenizer or frozen text encoder, image codec, checksum of the image tower.

    codec: None in an outline; tower: "source" and "checksum" of the frozen image tower that the run began with, None
    without one.
    """

    text: TextSide
    codec: Codec | None
    tower: Mapping[str, str] | None = None

    @classmethod
    def learn(cls, config: T2IConfig, examples: Examples, report: Report) -> Self:
        """Builds the tokenizer or opens the frozen encoder, opens the codec, and records the image tower."""
        text = TextSide.prepare(config.text, examples.captions(NUM_FOR_TOKENIZER))
        codec = open_codec(config.codec, first_pictures(examples, config.data.image_size, config.codec.factor))
        tower = _recorded_tower(config, report)
        if text.tokenizer is not None:
            shape = codec.latent_shape(config.data.image_size)
            report(f"tokenizer: {len(text.tokenizer)} tokens; codec: {config.codec.kind}, latent {shape}")
        return cls(text, codec, tower)

    def revised(self, before: T2IConfig, config: T2IConfig, examples: Examples, report: Report) -> Self:
        """With another frozen text encoder, and with the image tower where the losses need one."""
        tower = self.tower if self.tower is not None else _recorded_tower(config, report)
        keeps = config.text.loading() == before.text.loading() or not (config.text.frozen or before.text.frozen)
        if keeps:
            text = TextSide(config.text, self.text.tokenizer, self.text.frozen)
        else:
            text = TextSide.prepare(config.text, examples.captions(NUM_FOR_TOKENIZER))
        return replace(self, text=text, tower=tower)

    @classmethod
    def load(cls, config: T2IConfig, folder: Path) -> Self:
        """Reads tokenizer or encoder, codec, and the record of the image tower."""
        path = folder / TOWER_FILE
        tower = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return cls(TextSide.load(config.text, folder), read_codec(folder, config.codec), tower)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer or the record of the frozen encoder, the codec, and the record of the image tower."""
        assert self.codec is not None
        self.text.save(folder)
        self.codec.save(folder / FOLDER)
        if self.tower is not None:
            write_json(folder / TOWER_FILE, dict(self.tower))

    @classmethod
    def frozen(cls, config: T2IConfig) -> Self:
        """The frozen text encoder, if there is one, and the codec without its measured scale."""
        text = TextSide.prepare(config.text, ()) if config.text.frozen else TextSide(config.text)
        return cls(text, unscaled_codec(config.codec))

    @classmethod
    def outline(cls, config: T2IConfig) -> Self:
        """The text side of the settings alone."""
        return cls(TextSide(config.text), None)


def _recorded_tower(config: T2IConfig, report: Report) -> dict[str, str] | None:
    """Place and checksum of the frozen image tower; None for losses without one."""
    if not needs_tower(config):
        return None
    checksum = ImageTower.load(config.tower, None).checksum
    report(f"image tower: {config.tower.source}, weights sha256 {checksum[:16]}")
    return {"source": str(config.tower.source), "checksum": checksum}


class Adapter(Task[T2IConfig, TextToImageParts]):
    """Pictures uint8 (H, W, 3) from prompts."""

    name = "t2i"
    hub_tag = "text-to-image"
    Config = T2IConfig
    Parts = TextToImageParts
    Scoring = TextToImageScoring
    needs = frozenset({"image", "captions"})
    reads_features = True
    input_kind = "text"

    @property
    def text(self) -> TextSide:
        """How prompts are read."""
        return self.parts.text

    @property
    def codec(self) -> Codec:
        """Of the pictures."""
        assert self.parts.codec is not None, "an outline has no codec"
        return self.parts.codec

    @functools.cached_property
    def tower(self) -> ImageTower:
        """The frozen image tower; loaded by the first training batch, never for sampling."""
        tower = ImageTower.load(self.config.tower, self.parts.tower["checksum"] if self.parts.tower else None)
        return tower.to(self.device)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The frozen text encoder, the codec, and the image tower once it is loaded."""
        parts = (self.text.frozen, self.parts.codec, self.__dict__.get("tower"))
        return tuple(network for network in parts if network is not None)

    def extractor(self, options: Options) -> Extractor:
        """Of pictures, captions, and what the encoder loss looks at."""
        aligned = aligned_with(self.config)
        looks_at_padding = aligned == "tokens" or self.config.source.trunk == "released"
        return Extractor(
            options,
            codec=self.codec,
            text=self.text.frozen,
            pooled=aligned == "vector",
            keep_padding=looks_at_padding and self.config.text.padding == "features",
            pixels=aligned == "image" and not self.config.tower.frozen,
            tower=self.tower if needs_tower(self.config) and options.images else None,
        )

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """That of the image codec."""
        if self.parts.codec is None:
            return assumed_shape(self.config.codec, self.config.data.image_size)
        return self.parts.codec.latent_shape(self.config.data.image_size)

    def build_model(self) -> CrossFlow:
        """The text encoder in core's source encoder, and the backbone, which may read the text by cross-attention
        too.
        """
        config, shape = self.config, self.latent_shape
        trunk = None if config.source.kind == "gaussian" else self.text.build_trunk(config.source, shape)
        source = SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale)
        if not config.source.conditions:
            return CrossFlow(source, build_backbone(config.backbone, shape))
        backbone = build_backbone(config.backbone, shape, context_dim=config.source.width)
        return CrossFlow(source, backbone, self.text.build_condition_encoder(config.source))

    def build_objective(self, model: CrossFlow) -> Objective:
        """The losses, with the head for loss.encoder_target."""
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

    @classmethod
    def transform(cls, config: T2IConfig, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        """Without augmentation, too, the caption is drawn: each is as good a source of the picture."""
        return captioned_example(item, config.data.image_size, generator, first_caption=config.t2i.first_caption)

    def collate(self, examples: Sequence[Example]) -> Record:
        """Captions as tokens, pictures as pixels; of a cache what it holds of them, and of what z0 is aligned with."""
        cached = cached_batch(examples, self.config.data.image_size)
        record: Record = {"ids": tuple(example["id"] for example in examples)}
        record |= collate_pictures(self.codec, examples, cached)
        aligned = aligned_with(self.config)
        if cached is not None and aligned == "image":
            record["aligned"] = cached.tower() if needs_tower(self.config) else cached.pixels()
        if cached is None or self.text.frozen is None:
            record["tokens"], record["mask"] = self.text.tokens([example["caption"] for example in examples])
            return record
        record["features"], record["mask"] = cached.text()
        if aligned == "vector":
            record["aligned"] = cached.pooled()
        return record

    def batch(self, record: Record) -> Batch:
        """Captions as features, pictures as latents, and what z0 is aligned with."""
        mask, pooled = record["mask"], None
        if "features" in record:
            features = record["features"]
        else:
            features, pooled = self.text.read(record["tokens"], mask)
        source = self.as_source(features, mask)
        return Batch(
            features=features,
            mask=mask,
            target=latents(self.codec, record),
            condition=source.condition,
            alignment=record["aligned"] if "aligned" in record else self._alignment(features, pooled, record),
            ids=record["ids"],
        )

    def _alignment(self, features: Tensor, pooled: Tensor | None, record: Record) -> Tensor | None:
        """What the encoder loss compares z0 with."""
        aligned = aligned_with(self.config)
        if aligned == "nothing":
            return None
        if aligned == "image":
            return self.tower(record["image"]) if needs_tower(self.config) else record["image"]
        if aligned == "words":
            return self.text.reconstructed(features)
        return features if aligned == "tokens" or pooled is None else pooled

    # -- sampling

    def source(self, values: Sequence[str]) -> Source:
        """Prompts as features (B, N, ...) with their mask."""
        texts = list(dict.fromkeys(values))  # several pictures of a prompt need its features once
        ids, mask = (tensor.to(self.device) for tensor in self.text.tokens(texts))
        source = self.as_source(self.text.read(ids, mask)[0], mask)
        if len(texts) == len(values):
            return source
        return source[torch.tensor([texts.index(value) for value in values]).to(self.device)]

    def as_source(self, inputs: Tensor, mask: Tensor | None = None) -> Source:
        """Token ids (B, N) or features (B, N, D), mask (B, N); also as the condition of a backbone that reads one."""
        condition = Condition(tokens=inputs, mask=mask) if self.config.source.conditions else None
        return Source(inputs, mask, condition)

    @property
    def decodes_features(self) -> bool:
        """Whether the codec is guided by texts."""
        return self.codec.reads_text

    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3)."""
        return list(to_uint8(self.decoded(z1, features)))

    def decoded(self, z1: Tensor, features: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W); a codec that is guided by texts decodes under an empty one where none is known."""
        if not self.codec.reads_text:
            return self.codec.decode(z1, None)
        if features is None:
            features = self.source([""]).features.expand(len(z1), -1, -1)
        return self.codec.decode(z1, features)

    def unknown_words(self, value: str) -> list[str]:
        """Words that the run's own tokenizer spells in bytes; none with a pretrained text encoder."""
        return [] if self.text.tokenizer is None else unknown_words(self.text.tokenizer, value)

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """The centre square of a picture uint8 (H, W, 3), or of the path of one, as latent."""
        image = value if isinstance(value, np.ndarray) else load_image(value)
        pixels = to_tensor(center_crop_resize(image, self.config.data.image_size))
        return Pieces(list(self.codec.encode(pixels[None].to(self.device)).mean))

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes a picture uint8 (H, W, 3) as PNG."""
        return [save_png(output, stem.with_name(f"{stem.name}.png"), metadata)]
