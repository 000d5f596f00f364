"""The text variational encoder of CrossFlow and FlowTok as released, on features of a frozen text encoder.

Post-norm Transformer layers; then either three more that narrow the tokens eightfold and a head over all of them
(`flatten`: one linear map, `adaptor`: linear maps and convolutions, for 512 px), or a linear map per token (`tokens`).
Wide features (T5) are compressed first. B batch, N tokens, D width, C channels, H W height width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.layers import Attention, SampleLinear
from crossflow.networks.text.trunk import attendable

NUM_REDUCTIONS = 3
Head = Literal["flatten", "adaptor", "tokens"]


class UnbiasedNorm(nn.Module):
    """g (x - mean) / (std + 1e-5) + b over the last axis, with the unbiased standard deviation: not a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), computed in float32."""
        exact = x.float()
        normed = (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + 1e-5)
        return (self.g * normed + self.b).to(x.dtype)


class PostNormLayer(nn.Module):
    """x (B, N, D): x = norm(x + attn(x)); x = norm(x + ff(x)); with `output_width`, a linear map D -> D' follows.

    The mask hides keys; padded positions are computed like any other token and are not zeroed.
    """

    def __init__(self, width: int, hidden: int, heads: int, dropout: float, output_width: int | None = None) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = UnbiasedNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm2 = UnbiasedNorm(width)
        self.narrow = nn.Linear(width, output_width) if output_width is not None else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), mask (B, N) bool, True = token -> (B, N, D), or (B, N, D') with `output_width`."""
        x = self.norm1(x + self.dropout(self.attn(x, mask=mask)))
        x = self.norm2(x + self.dropout(self.down(torch.relu(self.up(x)))))
        return x if self.narrow is None else self.narrow(x)


class Compressor(nn.Sequential):
    """Linear, LayerNorm, ReLU, Linear: features (B, N, D') -> (B, N, D)."""

    def __init__(self, feature_width: int, width: int) -> None:
        super().__init__(nn.Linear(feature_width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


class Adaptor(nn.Module):
    """A vector (B, F) -> (B, channels, H, W): two linear maps to one value per position, then three convolutions.

    Each but the last is followed by a LayerNorm over everything but the batch, and a ReLU.
    """

    def __init__(self, num_inputs: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        area = height * width
        self.fc1, self.norm1 = SampleLinear(num_inputs, area), nn.LayerNorm(area)
        self.fc2, self.norm2 = SampleLinear(area, area), nn.LayerNorm(area)
        self.conv1, self.norm3 = nn.Conv2d(1, 32, 3, padding=1), nn.LayerNorm([32, height, width])
        self.conv2, self.norm4 = nn.Conv2d(32, 64, 3, padding=1), nn.LayerNorm([64, height, width])
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.grid = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F) -> (B, channels, H, W)."""
        x = torch.relu(self.norm1(self.fc1(x)))
        x = torch.relu(self.norm2(self.fc2(x))).unflatten(1, (1, *self.grid))
        x = torch.relu(self.norm3(self.conv1(x)))
        return self.conv3(torch.relu(self.norm4(self.conv2(x))))


@dataclass(frozen=True)
class TextVariationalSizes:
    """Sizes of a `TextVariationalTrunk`."""

    num_tokens: int
    """N, of every text."""
    feature_width: int
    """D' of the features; a `Compressor` comes first where it differs from width."""
    width: int
    """D of the layers."""
    depth: int
    """Number of layers, without the three that narrow the tokens."""
    hidden: int
    """Width of the feed-forward layers."""
    heads: int
    """Attention heads; they must divide the width of every layer."""
    dropout: float = 0.0
    """Probability in [0, 1)."""


class TextVariationalTrunk(nn.Module):
    """Features (B, N, D') and mask (B, N) -> (B, 2, *latent), mean and log-variance, for core's SourceEncoder.

    latent_shape: (C, H, W), or (N, C) with the head `tokens`. Raises UserError for sizes that do not fit each other.
    """

    def __init__(self, latent_shape: tuple[int, ...], sizes: TextVariationalSizes, head: Head) -> None:
        super().__init__()
        num_tokens, width, heads = sizes.num_tokens, sizes.width, sizes.heads
        self.latent_shape, self.num_tokens = tuple(latent_shape), num_tokens
        by_token = head == "tokens"
        narrowed = width if by_token else width // 2**NUM_REDUCTIONS
        if by_token != (len(latent_shape) == 2) or (by_token and latent_shape[0] != num_tokens):
            raise UserError(
                f"The head {head!r} cannot map {num_tokens} tokens to a latent {tuple(latent_shape)}: tokens predicts "
                "(N, C) with the same N; flatten and adaptor predict (C, H, W)."
            )
        if width % heads or narrowed * (1 if by_token else 2) % heads:
            raise UserError(
                f"source.heads = {heads} must divide the width of every layer, which shrinks from source.width = "
                f"{width} to {narrowed * (1 if by_token else 2)}."
            )
        self.compressor = Compressor(sizes.feature_width, width) if sizes.feature_width != width else None
        common = (sizes.hidden, heads, sizes.dropout)
        self.layers = nn.ModuleList(PostNormLayer(width, *common) for _ in range(sizes.depth))
        widths = [] if by_token else [width // 2**i for i in range(NUM_REDUCTIONS)]
        self.reductions = nn.ModuleList(PostNormLayer(wide, *common, output_width=wide // 2) for wide in widths)
        self.by_token = by_token
        if head == "adaptor":
            channels, height, columns = latent_shape
            self.head: nn.Module = Adaptor(num_tokens * narrowed, 2 * channels, height, columns)
        elif by_token:
            self.head = nn.Linear(narrowed, 2 * latent_shape[1])
        else:
            self.head = SampleLinear(num_tokens * narrowed, 2 * math.prod(latent_shape))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """features (B, N, D'), mask (B, N), nonzero = token -> (B, 2, *latent). Raises UserError for another N."""
        if features.shape[1] != self.num_tokens:
            raise UserError(
                f"This text encoder expects {self.num_tokens} tokens, got {features.shape[1]}. Pad or cut the text."
            )
        x = features if self.compressor is None else self.compressor(features)
        # FlowTok's encoder sees the padding too: its release passes no mask.
        mask = None if mask is None or self.by_token else attendable(mask.bool())
        for layer in [*self.layers, *self.reductions]:
            x = layer(x, mask)
        if self.by_token:
            return torch.stack(self.head(x).chunk(2, dim=-1), dim=1)  # (B, N, 2 C) -> (B, 2, N, C)
        return self.head(x.flatten(1)).flatten(1).unflatten(1, (2, *self.latent_shape))
