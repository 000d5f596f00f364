"""The contract of a codec: pictures (B, 3, H, W) float32 in [-1, 1] <-> latents (B, C, h, w) or tokens (B, N, C).

Latents are scaled to about unit variance, z = (raw - shift) * scale, the convention of latent diffusion (Rombach et al.
2022, section 4.3.2); scale and shift are saved with the codec. B batch, C channels, N tokens, H W height width.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import write_json
from crossflow.core.source import Posterior
from crossflow.networks.frozen import Frozen

logger = logging.getLogger(__name__)

SETTINGS_FILE = "codec.json"
WEIGHTS_FOLDER = "weights"
PerChannel = float | Sequence[float]
"""One number, or one per latent channel."""
Record = dict[str, Any]
"""The content of codec.json."""


class Codec(Frozen):
    """Base of all codecs: scaling, chunks and saving. A codec is frozen and stays in evaluation mode.

    channels: of the latent; factor: by how much height and width shrink; scale, shift: z = (raw - shift) * scale;
    chunk: maximum number of images that pass through its network at once. The network computes in float32, or in the
    half type of the autocast around the call; its inputs and outputs are float32.

    A subclass sets `kind` and implements `_encode`, `_decode` (raw latents) and `options`; its constructor takes those
    options. Add it to the table in registry.py.

    >>> import torch
    >>> from crossflow.networks.codecs.registry import build_codec
    >>> codec = build_codec("pixel", factor=2, scale=2.0)
    >>> images = torch.rand(4, 3, 16, 16) * 2 - 1
    >>> posterior = codec.encode(images)
    >>> tuple(posterior.mean.shape), codec.latent_shape(16)
    ((4, 12, 8, 8), (12, 8, 8))
    >>> torch.allclose(codec.decode(posterior.sample()), images, atol=1e-6)
    True
    """

    kind: ClassVar[str]
    channel_axis: ClassVar[int] = -3
    """Axis of a latent's channels: -3 in grids (C, h, w), -1 in tokens (N, C)."""
    reads_text: ClassVar[bool] = False
    """Whether `decode` needs the features of the picture's text."""
    has_spread: ClassVar[bool] = False
    """Whether the posterior of `encode` has a variance; otherwise it is a point."""
    source: str | None = None
    """Hub id or folder of the network; None for a network from memory, or no network at all."""
    scale: Tensor  # (C, 1, 1), or (C,) for tokens
    shift: Tensor

    def __init__(self, channels: int, factor: int, scale: PerChannel, shift: PerChannel, chunk: int) -> None:
        super().__init__()
        self.channels = channels
        self.factor = factor
        self.chunk = chunk
        per_channel = (channels,) + (1,) * (-1 - self.channel_axis)
        # Saved in codec.json, not with a network's weights.
        self.register_buffer("scale", torch.ones(per_channel), persistent=False)
        self.register_buffer("shift", torch.zeros(per_channel), persistent=False)
        self.set_scale(torch.as_tensor(scale), torch.as_tensor(shift))

    def set_scale(self, scale: Tensor, shift: Tensor) -> None:
        """Sets z = (raw - shift) * scale; each is one value or (C,).

        Raises UserError for other lengths, values that are not finite, and scale 0.
        """
        for name, value in (("scale", scale), ("shift", shift)):
            value = value.detach().float().flatten()
            if len(value) not in (1, self.channels) or not value.isfinite().all():
                raise UserError(
                    f"The {name} of a {self.kind} codec must be one finite number or {self.channels} "
                    f"(one per latent channel), got {value.tolist()}."
                )
            buffer = getattr(self, name)
            buffer.copy_(value.expand(self.channels).reshape(buffer.shape))
        if (self.scale == 0).any():
            raise UserError("The scale of a codec must not be 0: its latents could not be decoded.")

    @torch.no_grad()
    def fit_scale(self, batches: Iterable[Tensor], per_channel: bool = False) -> Self:
        """Measures scale and shift on images, so that their latents have mean 0 and variance 1.

        batches: images (B, 3, H, W) in [-1, 1]; per_channel: one pair per latent channel instead of one for all.
        Raises UserError when there are no images.
        """
        count, total, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for images in batches:
            raw = self.encode_moments(images).mean.cpu().double().movedim(self.channel_axis, 0).flatten(1)
            count += raw.shape[1]
            total += raw.sum(1)
            squares += raw.square().sum(1)
        if count == 0:
            raise UserError("The scale of a codec is measured on images, got none. Check that the data is not empty.")
        if not per_channel:
            count, total, squares = count * self.channels, total.sum()[None], squares.sum()[None]
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A constant channel carries no information: scaling it to unit variance would only magnify rounding.
        self.set_scale(torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 1.0), mean)
        logger.info(
            "%s codec: scale %s, shift %s", self.kind, self.scale.flatten().tolist(), self.shift.flatten().tolist()
        )
        return self

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) or (N, C) of the latent of an image of (H, W) pixels; a single number means a square.

        Raises UserError for sizes that the codec cannot encode.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.factor or width % self.factor or min(height, width) < self.factor:
            raise UserError(
                f"The {self.kind} codec shrinks images {self.factor} times, so height and width must be multiples of "
                f"{self.factor}, got {height} x {width}."
            )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_moments(self, x: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> posterior over raw latents (B, *latent), float32, without gradient.

        This is what a feature cache stores, since it does not depend on the scale.
        """
        self.latent_shape((x.shape[-2], x.shape[-1]))
        parts = [self._encode(part) for part in self._chunks(x.float())]
        means = torch.cat([part.mean.float() for part in parts])
        log_vars = [part.log_var.float() for part in parts if part.log_var is not None]
        return Posterior(means, torch.cat(log_vars) if log_vars else None)

    def scaled(self, raw: Posterior) -> Posterior:
        """The posterior over scaled latents (B, *latent) for a posterior over raw ones."""
        log_var = raw.log_var
        return Posterior(
            (raw.mean - self.shift) * self.scale, None if log_var is None else log_var + 2 * self.scale.abs().log()
        )

    def encode(self, x: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> posterior over scaled latents (B, *latent), float32, without gradient."""
        return self.scaled(self.encode_moments(x))

    def decode(self, z: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Scaled latents (B, *latent) -> images (B, 3, H, W), float32, not clamped; differentiable in z.

        text_features: (B, N, D) of the pictures' texts, required by a codec with `reads_text` and by no other.
        Raises UserError when they are missing or superfluous.
        """
        if self.reads_text and text_features is None:
            raise UserError(f"The {self.kind} codec decodes with text features, got none: pass text_features.")
        if text_features is not None and not self.reads_text:
            raise UserError(f"The {self.kind} codec decodes without text features: leave text_features out.")
        parts = [self._chunks(z.float() / self.scale + self.shift)]
        if text_features is not None:
            parts.append(self._chunks(text_features.to(z.device).float()))
        return torch.cat([self._decode(*part).float() for part in zip(*parts, strict=True)])

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        """x (B, ...) in parts of at most `chunk` items; an exported graph, whose B is open, takes it whole."""
        return (x,) if torch.compiler.is_exporting() else x.split(self.chunk)

    def save(self, folder: str | Path, embed: bool = False) -> Path:
        """Writes the codec to `folder`, which is created if necessary, and returns the folder's path.

        embed: copies the weights of a codec's network into the folder instead of recording their source.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, self.record(embed))
        return folder

    def record(self, embed: bool = False) -> Record:
        """The content of codec.json, from which `load_codec` restores the codec; JSON types only.

        embed: whether the weights of a codec's network lie in the same folder.
        """
        return {
            "kind": self.kind,
            "options": self.options(),
            "scale": self.scale.flatten().tolist(),
            "shift": self.shift.flatten().tolist(),
        }

    def options(self) -> dict[str, int | str]:
        """The arguments of the constructor or of `build`, other than scale and shift."""
        raise NotImplementedError

    def _encode(self, x: Tensor) -> Posterior:
        raise NotImplementedError

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def read_record(path: Path) -> Record:
    """The content of a codec.json. Raises UserError when it is damaged or does not describe a codec."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("kind", "options", "scale", "shift")} | record
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged and does not describe a codec ({type(error).__name__}: {error}). Save the codec again."
        ) from error
