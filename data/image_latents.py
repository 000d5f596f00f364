"""The image codec of a run and its settings, for the tasks whose pictures live in a latent space (t2i, caption)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from crossflow.core.config import Section
from crossflow.core.errors import UserError
from crossflow.core.noise import item_noise
from crossflow.core.source import Posterior
from crossflow.data.cache.training import CachedBatch, cache_of, pixel_pictures
from crossflow.data.dataset import Examples
from crossflow.networks.codecs.base import Codec
from crossflow.networks.codecs.registry import build_codec, load_codec

FOLDER = "codec"
FLOWTITOK_SHAPE = (77, 16)
NUM_FIRST = 512


class CodecSettings(Section):
    """Settings of the image codec, `codec.*`."""

    kind: Literal["pixel", "autoencoder_kl", "autoencoder_tiny", "flowtitok"] = "pixel"
    """pixel: the picture itself, scaled to unit variance; or a frozen autoencoder of diffusers, or FlowTiTok."""
    source: str | None = None
    """Hub id or folder of the autoencoder, or folder of a converted codec."""
    subfolder: str = ""
    scale: float | None = None
    """Factor on the autoencoder's latents (0.23010 and FlowTiTok's 1.0143 in the released models); none: its own."""
    shift: float | None = None
    factor: int = Field(1, ge=1)
    """pixel: squares of factor x factor pixels become channels."""


def open_codec(settings: CodecSettings, images: Iterable[Tensor]) -> Codec:
    """The codec of a new run; the pixel codec measures its scale on images (B, 3, H, W)."""
    if settings.kind == "pixel":
        if settings.source is not None:
            raise UserError(
                "codec.source names an autoencoder, but codec.kind = pixel has none; set "
                "codec.kind = autoencoder_kl, autoencoder_tiny or flowtitok."
            )
        return build_codec("pixel", factor=settings.factor).fit_scale(images)
    if settings.source is None:
        raise UserError(f"codec.kind = {settings.kind} needs codec.source, the hub id or folder of an autoencoder.")
    overrides = {"scale": settings.scale, "shift": settings.shift, "subfolder": settings.subfolder}
    return build_codec(
        settings.kind,
        source=settings.source,
        **{name: value for name, value in overrides.items() if value not in (None, "")},
    )


def unscaled_codec(settings: CodecSettings) -> Codec:
    """The codec before its scale is measured, for raw moments, which do not depend on it."""
    return build_codec("pixel", factor=settings.factor) if settings.kind == "pixel" else open_codec(settings, ())


def first_pictures(examples: Examples, image_size: int, factor: int) -> Iterator[Tensor]:
    """Pictures (B, 3, H, W) for measuring the pixel codec's scale, read lazily.

    image_size: side of the pictures in pixels; factor: of the pixel codec.
    """
    cache = cache_of(examples.reader)
    if cache is None:
        yield torch.stack([example["image"] for example in examples.first(NUM_FIRST)])
    else:
        entries = [example["entry"] for example in examples.first(NUM_FIRST)]
        yield from pixel_pictures(cache, entries, image_size, factor)


def read_codec(folder: Path, settings: CodecSettings | None = None) -> Codec:
    """The codec of a run.

    settings: of its configuration. If their `source` differs from the recorded one, the network is loaded from there;
    it must be the same network, if its checksum is known.
    """
    if settings is None or settings.source is None:
        return load_codec(folder / FOLDER)
    return load_codec(folder / FOLDER, source=settings.source, subfolder=settings.subfolder)


def assumed_shape(settings: CodecSettings, image_size: int) -> tuple[int, ...]:
    """The latent shape of the codec of these settings, without loading it.

    Autoencoders are assumed to have the latents of Stable Diffusion's (including the tiny ones).
    """
    if settings.kind == "flowtitok":
        return FLOWTITOK_SHAPE
    channels, factor = (3 * settings.factor**2, settings.factor) if settings.kind == "pixel" else (4, 8)
    return channels, image_size // factor, image_size // factor


def collate_pictures(codec: Codec, examples: Sequence[Any], cached: CachedBatch | None) -> dict[str, Tensor]:
    """What `latents` reads of training examples: "image", or "mean" and "log_var" of a cache; and the "noise" of the
    examples' seeds, for a codec whose posterior has a spread.
    """
    if cached is None:
        images = torch.stack([example["image"] for example in examples])
        record, shape, has_spread = {"image": images}, codec.latent_shape(images.shape[-1]), codec.has_spread
    else:
        moments = cached.moments()
        record, shape, has_spread = {"mean": moments.mean}, moments.mean.shape[1:], moments.log_var is not None
        if moments.log_var is not None:
            record["log_var"] = moments.log_var
    if has_spread:
        record["noise"] = latent_noise([example["seed"] for example in examples], shape)
    return record


def latent_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal, keyed by one seed per row: the noise of latents drawn from a codec's posterior."""
    return item_noise(0, [str(seed) for seed in seeds], shape)


def latents(codec: Codec, record: Mapping[str, Any]) -> Tensor:
    """The scaled latents (B, *latent) of a record of `collate_pictures`, on the codec's device: samples, or means."""
    if "mean" in record:
        posterior = codec.scaled(Posterior(record["mean"], record.get("log_var")))
    else:
        posterior = codec.encode(record["image"])
    return posterior.sample(noise=record["noise"]) if "noise" in record else posterior.mean
