"""The cached features of an item: moments of its picture, features of its captions, targets of the encoder loss.

A task builds an `Extractor` from its frozen networks, for `crossflow cache` and again in training, where its
description must agree with that of the cache. B batch, N tokens, D width, S picture size in pixels.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.precision import autocast
from crossflow.core.source import Posterior
from crossflow.data.item import BadItem, Item
from crossflow.data.resize import center_crop_resize
from crossflow.networks.codecs.base import Codec
from crossflow.networks.frozen import Frozen
from crossflow.networks.text.frozen_encoder import FrozenTextEncoder

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """How features are computed and stored."""

    sizes: tuple[int, ...]
    """Sides of the square pictures in pixels."""
    storage: str = "float16"
    """Data type in the shards: float16, bfloat16 or float32."""
    device: str = "cpu"
    """Device of the networks."""
    precision: str = "float32"
    """Of their matrix products: float32, bf16 or fp16, see `core.precision`."""
    compile: bool = False
    """Compile the blocks of the networks at their first use."""
    offload: bool = False
    """Keep the networks on the CPU; their layers visit the device while they compute."""
    images: bool = True
    """False for data without pictures, such as a list of prompts."""


class Tower(Protocol):
    """A frozen image tower, identified by a checksum."""

    width: int
    checksum: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] -> embeddings (B, width)."""


@dataclass(frozen=True)
class Features:
    """The features of one item."""

    fixed: Mapping[str, Tensor]
    """Tensors of the same shape for every item, by name."""
    text: Sequence[Tensor] = ()
    """(n, D) for each caption; n includes padding only where padding is kept."""
    lengths: Sequence[int] = ()
    """Number of tokens of each caption."""
    pooled: Sequence[Tensor] = ()
    """(D,) for each caption."""


class Extractor:
    """Items -> `Features`, computed by the frozen networks of a recipe.

    Args:
        options: sizes, data type and device.
        codec: of the pictures; None for prompts alone.
        text: encoder of the captions; None for models that read words.
        pooled: store one vector per caption too.
        keep_padding: store the features of padding tokens, for models that attend to them.
        pixels: store the pictures (uint8), for an encoder loss with a trained image tower.
        tower: store the embeddings of this frozen image tower.

    Raises:
        UserError: neither pictures nor a text encoder, so there is nothing to cache.
    """

    def __init__(
        self,
        options: Options,
        *,
        codec: Codec | None = None,
        text: FrozenTextEncoder | None = None,
        pooled: bool = False,
        keep_padding: bool = False,
        pixels: bool = False,
        tower: Tower | None = None,
    ) -> None:
        self.options = options
        self.codec = codec if options.images else None
        self.text, self.pooled, self.keep_padding = text, pooled, keep_padding
        self.pixels = pixels and options.images
        self.tower = tower if options.images else None
        if self.codec is None and text is None:
            raise UserError(
                "Nothing to cache: the data have no pictures and the recipe has no frozen text encoder (text.encoder). "
                "Give data with pictures, or a recipe with frozen text features."
            )

    def describe(self) -> dict[str, Any]:
        """The features and the networks that determine them, in JSON types: {"networks": ..., "parts": ...}."""
        networks: dict[str, Any] = {}
        parts: dict[str, Any] = {}
        if self.codec is not None:
            networks["codec"] = codec_identity(self.codec)
            for size in self.options.sizes:
                parts[f"moments_{size}"] = {
                    "shape": list(self.codec.latent_shape(size)),
                    "spread": self.codec.has_spread,
                }
        if self.pixels:
            parts |= {f"pixels_{size}": {"shape": [3, size, size]} for size in self.options.sizes}
        if self.tower is not None:
            networks["tower"] = {"sha256": self.tower.checksum}
            parts |= {f"tower_{size}": {"shape": [self.tower.width]} for size in self.options.sizes}
        if self.text is not None:
            networks["text"] = text_identity(self.text)
            parts["text"] = {
                "width": self.text.width,
                "max_length": self.text.max_length,
                "padding": "kept" if self.keep_padding else "dropped",
                "pooled": self.pooled,
            }
        return {"networks": networks, "parts": parts}

    def numbers(self) -> dict[str, str]:
        """How the features are rounded, which with `describe` determines their values: their type in the shards, and
        the precision of the networks unless it is float32.
        """
        options = self.options
        return {"storage": options.storage} | (
            {"precision": options.precision} if options.precision != "float32" else {}
        )

    def prepare(self) -> None:
        """Moves the networks to the device, or makes their layers visit it, and compiles them, as the options say."""
        from crossflow.core.training.prepare import compile_blocks

        device = torch.device(self.options.device)
        networks = [part for part in (self.codec, self.text, self.tower) if isinstance(part, torch.nn.Module)]
        for network in networks:
            if self.options.compile and list(network.parameters()):
                compile_blocks(network)
            if self.options.offload and isinstance(network, Frozen):
                network.offload(device)
            else:
                network.to(device)

    @property
    def precision(self) -> AbstractContextManager[object]:
        """The context in which the networks compute."""
        return autocast(torch.device(self.options.device), self.options.precision)

    def num_tokens(self, captions: Sequence[str]) -> int:
        """Number of rows of token features that the captions take."""
        assert self.text is not None
        return self.text.max_length * len(captions) if self.keep_padding else int(self.text.tokens(captions)[1].sum())

    @property
    def needs(self) -> frozenset[str]:
        """The fields of items that are used."""
        return frozenset({"captions"} | ({"image"} if self.codec is not None else set()))

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> list[Features | BadItem]:
        """The features of items, computed in one batch; a BadItem where they are unusable."""
        fixed = self.image_features(items, with_moments=True)
        with self.precision:
            texts = self._text_features(items)
        return [finite_or_bad(item, Features(row, *text)) for item, row, text in zip(items, fixed, texts, strict=True)]

    def image_features(self, items: Sequence[Item], with_moments: bool) -> list[dict[str, Tensor]]:
        """name -> tensor, computed from the picture of each item."""
        fixed: list[dict[str, Tensor]] = [{} for _ in items]
        if self.codec is not None and (with_moments or self.pixels or self.tower is not None):
            for size in self.options.sizes:
                with self.precision:
                    self._add_image_features(fixed, items, size, with_moments)
        return fixed

    def _add_image_features(
        self, rows: Sequence[dict[str, Tensor]], items: Sequence[Item], size: int, with_moments: bool
    ) -> None:
        """Adds the features at one picture size to the row of each item."""
        assert self.codec is not None
        pictures = [center_crop_resize(_picture(item), size) for item in items]
        uint8 = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])  # (B, 3, S, S)
        images = from_uint8(uint8).to(self.options.device)
        features: dict[str, Tensor] = {}
        if with_moments:
            features |= self.moments(self.codec.encode_moments(images), size)
        if self.pixels:
            features[f"pixels_{size}"] = uint8
        if self.tower is not None:
            features[f"tower_{size}"] = self.stored(self.tower(images))
        for name, values in features.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value

    def moments(self, raw: Posterior, size: int) -> dict[str, Tensor]:
        """The entry `moments_SIZE`: (B, 1 or 2, *latent), mean and log-variance, in the storage type."""
        both = [raw.mean] if raw.log_var is None else [raw.mean, raw.log_var]
        return {f"moments_{size}": self.stored(torch.stack(both, 1))}

    def _text_features(self, items: Sequence[Item]) -> list[tuple[Sequence[Tensor], Sequence[int], Sequence[Tensor]]]:
        """(features, lengths, pooled) of the captions of each item."""
        captions = [caption for item in items for caption in item.captions]
        if self.text is None or not captions:
            return [((), (), ())] * len(items)
        features, mask = self.text(captions)
        lengths = mask.sum(1).tolist()
        tokens = list(self.stored(features))
        if not self.keep_padding:
            tokens = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        pooled = list(self.stored(self.text.pooled(captions))) if self.pooled else []
        result: list[tuple[Sequence[Tensor], Sequence[int], Sequence[Tensor]]] = []
        start = 0
        for item in items:
            part = slice(start, start + len(item.captions))
            result.append((tokens[part], lengths[part], pooled[part]))
            start = part.stop
        return result

    def stored(self, values: Tensor) -> Tensor:
        """Values in the storage type, on the CPU. Raises UserError when they overflow it."""
        result = values.detach().to(STORAGE[self.options.storage]).cpu()
        if result.isinf().any() and not values.isinf().any():
            raise UserError(
                f"Features of {values.abs().max().item():.3g} overflow float16 (65504): cache them with --storage "
                "bfloat16 or float32."
            )
        return result


def from_uint8(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as without a cache."""
    return pictures.float() / 127.5 - 1


def codec_identity(codec: Codec) -> dict[str, Any]:
    """What determines raw moments. Scale and shift are applied later, so they are not part of it."""
    return {
        "kind": codec.kind,
        "sha256": getattr(codec, "checksum", None),  # the pixel codec has no weights
        "factor": codec.factor,
    }


def text_identity(text: FrozenTextEncoder) -> dict[str, Any]:
    """What determines the features of a caption."""
    return {
        "family": text.family,
        "sha256": text.checksum,
        "scale": text.settings.scale,
        "layer": text.settings.layer,
        "template": text.settings.template,
        "clean": text.settings.clean,
        "pad_id": text.settings.pad_id,  # determines the features of padding, where those are kept
    }


def _picture(item: Item) -> np.ndarray:
    assert item.image is not None
    return item.image


def finite_or_bad(item: Item, features: Features) -> Features | BadItem:
    """The features, or a BadItem when any value is not finite."""
    values = [*features.fixed.values(), *features.text, *features.pooled]
    if not all(value.isfinite().all() for value in values):
        return BadItem(item.id, "its features are not finite")
    return features
