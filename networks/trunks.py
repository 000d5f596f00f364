"""Trunks of source encoders that read pictures. B batch, C channels, H W height width, p patch, D width."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.layers import DepthwiseConv, TransformerLayer, patchify, rotary_2d, sincos_2d, unpatchify


class ConvStem(nn.Module):
    """A small residual network in place of the linear patch embedding: (B, C, H, W) -> (B, H/p * W/p, D).

    It learns edges and colours within a few hundred steps, where a linear map of patches takes thousands. p must be a
    power of two, and D / 2 a multiple of 8. Raises UserError for other p.
    """

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        if patch < 2 or patch & (patch - 1):
            raise UserError(f"A convolutional stem halves the picture, so patch must be 2, 4, 8, ..., got {patch}.")
        layers: list[nn.Module] = []
        channels = in_channels
        for number in range(patch.bit_length() - 1, 0, -1):
            wide = max(16, width // 2**number)
            layers += [nn.Conv2d(channels, wide, 4, stride=2, padding=1), ExactGroupNorm(8, wide), nn.GELU()]
            layers += [ResidualBlock(wide)]
            channels = wide
        self.layers = nn.Sequential(*layers, ResidualBlock(channels))
        self.project = nn.Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), H and W multiples of p -> (B, H/p * W/p, D)."""
        features = self.layers(x.contiguous(memory_format=torch.channels_last))  # the fastest order on the CPU
        return self.project(features.flatten(2).transpose(1, 2))


class ExactGroupNorm(nn.GroupNorm):
    """A group norm in the precision of its weights also after a convolution in a half type, whose kernel for channels
    last takes five times as long on the CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """x + two 3 x 3 convolutions, each with a group norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ExactGroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ExactGroupNorm(8, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        return F.gelu(x + self.body(x))


@dataclass(frozen=True)
class PatchTrunkSettings:
    """Sizes, positions and initial moments of a `PatchTrunk`."""

    width: int
    """D."""
    depth: int
    """Number of transformer layers."""
    patch: int
    """Side p of a patch in pixels."""
    positions: Literal["sincos", "rotary", "none"] = "sincos"
    """How the layers know the place of a patch: sincos adds fixed positions, rotary extends to larger pictures, and
    without any the convolutions alone know its neighbours.
    """
    trained_grid: tuple[int, int] | None = None
    """Rotary positions: the grid (H/p, W/p) of the training pictures."""
    mean_std: float = 0.02
    """The mean initially has a deviation of about mean_std sqrt(width)."""
    log_var: float = 0.0
    """Initial log-variance."""
    conv_stem: bool = False
    """Read patches by a `ConvStem` instead of one linear map."""


class PatchTrunk(nn.Module):
    """Patches, a few transformer layers, and back to the grid: (B, C, H, W) -> (B, 2, C', H, W), mean and log-variance.

    A depthwise convolution before every layer mixes neighbouring patches. H and W may be any multiples of the patch.

    >>> trunk = PatchTrunk(3, 1, PatchTrunkSettings(width=32, depth=1, patch=4))
    >>> tuple(trunk(torch.zeros(2, 3, 16, 24)).shape)
    (2, 2, 1, 16, 24)
    """

    def __init__(self, in_channels: int, out_channels: int, settings: PatchTrunkSettings) -> None:
        super().__init__()
        width, patch = settings.width, settings.patch
        self.patch, self.positions, self.out_channels = patch, settings.positions, out_channels
        self.heads, self.trained_grid = max(1, width // 32), settings.trained_grid
        linear = not settings.conv_stem
        self.embed = nn.Linear(in_channels * patch**2, width) if linear else ConvStem(in_channels, width, patch)
        depth = range(settings.depth)
        self.convs = nn.ModuleList(DepthwiseConv(width, 3) for _ in depth)
        self.layers = nn.ModuleList(TransformerLayer(width, self.heads) for _ in depth)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * out_channels * patch**2)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        # Channels of the head are (p_h, p_w, [mean | log_var], C') with C' fastest, see `patchify`.
        self.head.weight.data.reshape(patch**2, 2, out_channels, width)[:, 0] *= settings.mean_std / 0.02
        self.head.bias.data.reshape(patch**2, 2, out_channels)[:, 1] = settings.log_var

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """features (B, C, H, W) -> (B, 2, C', H, W); the mask is ignored."""
        height, width = features.shape[-2:]
        grid = (height // self.patch, width // self.patch)
        patches = features if isinstance(self.embed, ConvStem) else patchify(features, self.patch)
        x = self.embed(patches)  # (B, H/p * W/p, D)
        rotary = None
        if self.positions == "rotary":
            rotary = rotary_2d(*grid, x.shape[-1] // self.heads, self.trained_grid, x.device)
        elif self.positions == "sincos":
            x = x + sincos_2d(*grid, x.shape[-1], x.device).to(x.dtype)
        for conv, layer in zip(self.convs, self.layers, strict=True):
            x = x + conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            x = layer(x, rotary=rotary)
        both = unpatchify(self.head(self.norm(x)), self.patch, height, width)  # (B, 2C', H, W)
        return both.unflatten(1, (2, self.out_channels))


class IdentityTrunk(nn.Module):
    """The mean is the source itself, which has the target's shape: (B, C, H, W) -> (B, 2, C, H, W).

    variational: the log-variance is a 3 x 3 convolution of the features, initially `log_var` everywhere; otherwise 0.
    """

    def __init__(self, channels: int, variational: bool, log_var: float = -6.0) -> None:
        super().__init__()
        self.log_var = nn.Conv2d(channels, channels, 3, padding=1) if variational else None
        if self.log_var is not None:
            nn.init.zeros_(self.log_var.weight)
            nn.init.constant_(self.log_var.bias, log_var)  # type: ignore[arg-type]

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """features (B, C, H, W) -> (B, 2, C, H, W); the mask is ignored."""
        second = torch.zeros_like(features) if self.log_var is None else self.log_var(features)
        return torch.stack([features, second], dim=1)


class ResidualTrunk(nn.Module):
    """The mean is the source plus a correction, which is zero at first: (B, C, H, W) -> (B, 2, C, H, W).

    >>> trunk = ResidualTrunk(3, PatchTrunkSettings(width=32, depth=1, patch=4))
    >>> picture = torch.randn(2, 3, 16, 24)
    >>> torch.equal(trunk(picture)[:, 0], picture)
    True
    """

    def __init__(self, channels: int, settings: PatchTrunkSettings) -> None:
        super().__init__()
        self.correction = PatchTrunk(channels, channels, replace(settings, mean_std=0.0))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """features (B, C, H, W) -> (B, 2, C, H, W); the mask is ignored."""
        mean, log_var = self.correction(features).unbind(1)
        return torch.stack([features + mean, log_var], dim=1)


class Reconstructor(nn.Module):
    """Decoder of the reconstruction loss: z0 (B, C, H, W) -> (B, C', H, W), two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, out_channels, 3, padding=1),
        )

    def forward(self, z0: Tensor) -> Tensor:
        """z0 (B, C, H, W) -> (B, C', H, W)."""
        return self.net(z0)
