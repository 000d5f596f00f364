"""Codecs: pixels (B, 3, H, W) float32 in [-1, 1] <-> latents (B, C, h, w), or tokens (B, N, C), of about unit variance.

z = (raw - shift) * scale, the convention of latent diffusion (Rombach et al. 2022, section 4.3.2); scale and shift are
saved with the codec. Kinds: `pixel` (no network), `autoencoder_kl` (Stable Diffusion), `autoencoder_tiny` (TAESD),
`flowtitok` (tokens; in flowtitok.py). B batch, C channels, N tokens, H W height width.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.registry import Registry
from crossflow.core.source import Posterior
from crossflow.networks.frozen import expect_checksum, freeze, load_frozen, weights_checksum, write_json

logger = logging.getLogger(__name__)

CODECS: Registry[type["Codec"]] = Registry("codec")
SETTINGS_FILE = "codec.json"
WEIGHTS_FOLDER = "weights"


def build_codec(kind: str, **options: Any) -> "Codec":
    """A codec of one of the `CODECS`, from the options of its `build`. Raises UserError on an unknown kind."""
    from crossflow.networks.codecs import flowtitok  # noqa: F401  (enters the registry)

    return CODECS.get(kind).build(**options)


def load_codec(folder: str | Path, *, source: str | None = None, subfolder: str = "") -> "Codec":
    """The codec that `Codec.save` wrote to `folder`; a public network is found again by its id or path, and checked.

    source, subfolder: where its weights lie now, if that has changed; a relative path that was recorded as an absolute
    one has not. Raises UserError if they cannot be had or are not the same.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no codec: there is no {SETTINGS_FILE} in it.")
    settings = _read_settings(path)
    options = dict(settings["options"])
    checksum = settings.get("sha256")
    if settings.get("embedded"):
        options |= {"source": str(Path(folder) / WEIGHTS_FOLDER), "subfolder": ""}
    elif source is not None and "source" not in options:
        raise UserError(f"The {settings['kind']} codec in {folder} has no network; take codec.source={source} away.")
    elif source is not None and not _same_place(source, options["source"]):
        options |= {"source": source, "subfolder": subfolder}
    if checksum is not None:
        options["checksum"] = checksum
    codec = build_codec(settings["kind"], **options)
    codec.set_scale(torch.tensor(settings["scale"]), torch.tensor(settings["shift"]))
    if settings.get("embedded"):
        codec.source = None  # so that it is embedded again when saved elsewhere
    return codec


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {name: settings[name] for name in ("kind", "options", "scale", "shift")} | settings
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged and does not describe a codec ({type(error).__name__}: {error}). Save the codec again."
        ) from error


def _same_place(source: str, recorded: str) -> bool:
    return f"/{recorded}".endswith("/" + os.path.normpath(source).lstrip("./"))


class Codec(nn.Module):
    """What all kinds share: scaling, chunks, saving. It is frozen and stays in evaluation mode.

    channels: of the latent; factor: by how much height and width shrink; chunk: images that pass its network at once.
    scale, shift: one value, or one per latent channel.
    """

    kind: ClassVar[str]
    channel_axis: ClassVar[int] = -3
    """Where a latent's channels lie: -3 in grids (C, h, w), -1 in tokens (N, C)."""
    reads_text: ClassVar[bool] = False
    """Whether `decode` needs the features of the picture's text."""
    source: str | None = None
    scale: Tensor  # (C, 1, 1), or (C,) for tokens
    shift: Tensor

    def __init__(
        self, channels: int, factor: int, scale: float | Sequence[float], shift: float | Sequence[float], chunk: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.factor = factor
        self.chunk = chunk
        per_channel = (channels,) + (1,) * (-1 - self.channel_axis)
        # Saved in codec.json, not with a network's weights.
        self.register_buffer("scale", torch.ones(per_channel), persistent=False)
        self.register_buffer("shift", torch.zeros(per_channel), persistent=False)
        self.set_scale(torch.as_tensor(scale), torch.as_tensor(shift))

    @classmethod
    def build(cls, *args: Any, **options: Any) -> Self:
        """The codec from the settings of a recipe."""
        return cls(*args, **options)

    def set_scale(self, scale: Tensor, shift: Tensor) -> None:
        """Sets z = (raw - shift) * scale, each one value or one per latent channel.

        Raises UserError on other lengths, values that are not finite, and scale 0.
        """
        for name, value in (("scale", scale), ("shift", shift)):
            value = value.detach().float().flatten()
            if len(value) not in (1, self.channels) or not value.isfinite().all():
                raise UserError(
                    f"The {name} of a {self.kind} codec must be one finite number or {self.channels} "
                    f"(one per latent channel), not {value.tolist()}."
                )
            buffer = getattr(self, name)
            buffer.copy_(value.expand(self.channels).reshape(buffer.shape))
        if (self.scale == 0).any():
            raise UserError("The scale of a codec must not be 0: a latent could not be decoded.")

    @torch.no_grad()
    def fit_scale(self, batches: Iterable[Tensor], per_channel: bool = False) -> Self:
        """Measures scale and shift, so that the latents of these images have mean 0 and variance 1.

        batches: images (B, 3, H, W); per_channel: one pair per latent channel instead of one for all.
        """
        count, total, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for images in batches:
            raw = self.encode_moments(images).mean.cpu().double().movedim(self.channel_axis, 0).flatten(1)
            count += raw.shape[1]
            total += raw.sum(1)
            squares += raw.square().sum(1)
        if count == 0:
            raise UserError("The scale of a codec is measured on images, and none were given.")
        if not per_channel:
            count, total, squares = count * self.channels, total.sum()[None], squares.sum()[None]
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A constant channel carries nothing; it is left as it is instead of being blown up.
        self.set_scale(torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 1.0), mean)
        logger.info(
            "%s codec: scale %s, shift %s", self.kind, self.scale.flatten().tolist(), self.shift.flatten().tolist()
        )
        return self

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) or (N, C) of the latent of an image of that size; a number means square. Raises UserError on sizes
        that cannot be encoded.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.factor or width % self.factor or min(height, width) < self.factor:
            raise UserError(
                f"The {self.kind} codec shrinks images {self.factor} times, so height and width must be multiples of "
                f"{self.factor}; {height} x {width} are not."
            )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_moments(self, x: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> posterior over raw latents (B, *latent), float32, without gradient.

        This is what a feature cache stores, since it does not depend on the scale.
        """
        self.latent_shape((x.shape[-2], x.shape[-1]))
        with torch.autocast(x.device.type, enabled=False):
            parts = [self._encode(part) for part in x.float().split(self.chunk)]
        means = torch.cat([part.mean for part in parts])
        log_vars = [part.log_var for part in parts if part.log_var is not None]
        return Posterior(means, torch.cat(log_vars) if log_vars else None)

    def scaled(self, raw: Posterior) -> Posterior:
        """The posterior over scaled latents that belongs to raw moments."""
        log_var = raw.log_var
        return Posterior(
            (raw.mean - self.shift) * self.scale, None if log_var is None else log_var + 2 * self.scale.abs().log()
        )

    def encode(self, x: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> posterior over scaled latents (B, *latent); float32, without gradient."""
        return self.scaled(self.encode_moments(x))

    def decode(self, z: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Scaled latents (B, *latent) -> images (B, 3, H, W), float32, not clamped; differentiable in z.

        text_features: (B, N, D) of the pictures' texts, for a codec that `reads_text` and for no other.
        """
        if self.reads_text != (text_features is not None):
            raise UserError(
                f"The {self.kind} codec decodes {'under the guidance of text features' if self.reads_text else 'alone'}"
                f", and text features were {'not ' * self.reads_text}given."
            )
        with torch.autocast(z.device.type, enabled=False):
            parts = [(z.float() / self.scale + self.shift).split(self.chunk)]
            if text_features is not None:
                parts.append(text_features.to(z.device).float().split(self.chunk))
            return torch.cat([self._decode(*part).float() for part in zip(*parts, strict=True)])

    def train(self, mode: bool = True) -> Self:
        """Does nothing but keep evaluation mode: a codec is frozen."""
        return super().train(False)

    def save(self, folder: str | Path, embed: bool = False) -> Path:
        """Writes the codec to `folder` (made if need be) and returns it.

        A network that came from a hub id or path is recorded by that and the checksum of its weights; the weights are
        copied into the folder when `embed` is true or when it came from neither.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        embedded = False
        if isinstance(self, NetworkCodec):
            embedded = embed or self.source is None
            if embedded:
                self.network.save_pretrained(folder / WEIGHTS_FOLDER)
        self.save_settings(folder, embedded)
        return folder

    def save_settings(self, folder: Path, embedded: bool) -> None:
        """Writes what `load_codec` reads; embedded: a network's weights lie in the folder, too."""
        settings: dict[str, Any] = {
            "kind": self.kind,
            "options": self._options(),
            "scale": self.scale.flatten().tolist(),
            "shift": self.shift.flatten().tolist(),
        }
        if isinstance(self, NetworkCodec):
            settings |= {"sha256": self.checksum, "embedded": embedded}
        write_json(folder / SETTINGS_FILE, settings)

    def _encode(self, x: Tensor) -> Posterior:
        raise NotImplementedError

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        raise NotImplementedError


@CODECS.register("pixel")
class PixelCodec(Codec):
    """The picture itself, z = (x - shift) * scale, with squares of `factor` x `factor` pixels moved into channels.

    image_channels: 3, or 1 for depth maps; scale, shift: per data set (`fit_scale`), for latents of unit variance.
    """

    kind = "pixel"

    def __init__(
        self,
        image_channels: int = 3,
        factor: int = 1,
        scale: float | Sequence[float] = 1.0,
        shift: float | Sequence[float] = 0.0,
        chunk: int = 256,
    ) -> None:
        if image_channels not in (1, 3):
            raise UserError(f"Pixels have 3 channels, or 1 for depth; image_channels = {image_channels} is neither.")
        if factor < 1:
            raise UserError(f"The factor of a pixel codec is a whole number from 1 on, not {factor}.")
        super().__init__(image_channels * factor**2, factor, scale, shift, chunk)
        self.image_channels = image_channels

    def _encode(self, x: Tensor) -> Posterior:
        if x.shape[1] != self.image_channels:
            raise UserError(f"This pixel codec takes {self.image_channels} channels; the images have {x.shape[1]}.")
        return Posterior(F.pixel_unshuffle(x, self.factor))

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(raw, self.factor)

    def _options(self) -> dict[str, Any]:
        return {"image_channels": self.image_channels, "factor": self.factor, "chunk": self.chunk}


class NetworkCodec(Codec):
    """A frozen network: by hub id or folder (`build`), or one already in memory (the constructor)."""

    network: Any
    whence: ClassVar[str]
    """What its source can be."""

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        factor: int,
        scale: float | Sequence[float],
        shift: float | Sequence[float],
        chunk: int,
    ) -> None:
        super().__init__(channels, factor, scale, shift, chunk)
        self.network = freeze(network).float()
        self.subfolder = ""
        self.eval()

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights."""
        return weights_checksum(self.network)

    @classmethod
    def build(
        cls,
        source: str = "",
        subfolder: str = "",
        checksum: str | None = None,
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
        chunk: int = 8,
    ) -> Self:
        """The codec around the network at `source`, a hub id or folder (`subfolder` of it), in float32.

        A folder may also be one that `save` wrote with its weights; its scale and shift then hold unless others are
        given. checksum: SHA-256 the weights must have, None accepts any. Raises UserError when it cannot be had or
        differs.
        """
        if not source:
            raise UserError(f"The {cls.kind} codec needs its source (codec.source): {cls.whence}.")
        if Path(source).expanduser().is_dir():
            source = str(Path(source).expanduser().resolve())  # a run is also read from another working directory
            saved = Path(source) / SETTINGS_FILE
            if saved.is_file() and not subfolder:
                subfolder, scale, shift = cls._as_saved(saved, scale, shift)
        make: Callable[..., Self] = cls  # its kinds are made of a network alone
        codec = make(cls._load(source, subfolder), scale=scale, shift=shift, chunk=chunk)
        if checksum is not None:
            expect_checksum(source, codec.checksum, checksum)
        codec.source, codec.subfolder = source, subfolder
        logger.info("%s codec: %s, weights sha256 %s", cls.kind, source, codec.checksum)
        return codec

    @classmethod
    def _as_saved(cls, path: Path, scale: Any, shift: Any) -> tuple[str, Any, Any]:
        """Subfolder, scale and shift of a codec saved with its weights, the latter two unless others are given."""
        settings = _read_settings(path)
        if settings["kind"] != cls.kind or not settings.get("embedded"):
            having = "with" if settings.get("embedded") else "without"
            raise UserError(
                f"{path.parent} holds a {settings['kind']} codec {having} its weights; a {cls.kind} codec with "
                "them is needed."
            )
        return (
            WEIGHTS_FOLDER,
            settings["scale"] if scale is None else scale,
            settings["shift"] if shift is None else shift,
        )

    @classmethod
    def _load(cls, source: str, subfolder: str) -> nn.Module:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {"source": self.source or "", "subfolder": self.subfolder, "chunk": self.chunk}


class _AutoencoderCodec(NetworkCodec):
    """A frozen autoencoder of diffusers. scale, shift: None takes its own `scaling_factor` and `shift_factor`."""

    def __init__(
        self,
        network: nn.Module,
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
        chunk: int = 8,
    ) -> None:
        config: Any = network.config
        own_scale, own_shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None)
        super().__init__(
            network,
            config.latent_channels,
            self._factor(config),
            scale if scale is not None else 1.0 if own_scale is None else own_scale,
            shift if shift is not None else 0.0 if own_shift is None else own_shift,
            chunk,
        )

    @classmethod
    def _load(cls, source: str, subfolder: str) -> nn.Module:
        files = "config.json and diffusion_pytorch_model.safetensors"
        network: nn.Module = load_frozen(cls._loader(), source, files=files, subfolder=subfolder)
        return network

    @staticmethod
    def _loader() -> Callable[..., Any]:
        raise NotImplementedError

    @staticmethod
    def _factor(config: Any) -> int:
        raise NotImplementedError

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        return self.network.decode(raw).sample


@CODECS.register("autoencoder_kl")
class AutoencoderKLCodec(_AutoencoderCodec):
    """The variational autoencoder of latent diffusion. Scale 0.18215 in its config, 0.23010 in CrossFlow."""

    kind = "autoencoder_kl"
    example: ClassVar[str] = "stabilityai/sd-vae-ft-ema"
    whence = f"a hub id such as {example}, or a folder"

    @staticmethod
    def _loader() -> Callable[..., Any]:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained

    @staticmethod
    def _factor(config: Any) -> int:
        return 2 ** (len(config.block_out_channels) - 1)

    def _encode(self, x: Tensor) -> Posterior:
        law = self.network.encode(x).latent_dist
        return Posterior(law.mean, law.logvar)


@CODECS.register("autoencoder_tiny")
class AutoencoderTinyCodec(_AutoencoderCodec):
    """A small distilled autoencoder (TAESD); its latent is a point, without variance."""

    kind = "autoencoder_tiny"
    whence = "a hub id such as madebyollin/taesd, or a folder"

    @staticmethod
    def _loader() -> Callable[..., Any]:
        from diffusers import AutoencoderTiny

        return AutoencoderTiny.from_pretrained

    @staticmethod
    def _factor(config: Any) -> int:
        return 2 ** (len(config.encoder_block_out_channels) - 1)

    def _encode(self, x: Tensor) -> Posterior:
        return Posterior(self.network.encode(x).latents)
