"""The text variational encoder of CrossFlow and FlowTok as released, around features of a frozen text encoder.

Post-norm Transformer layers; then either three more that narrow the tokens eightfold and a head over all of them
(`flatten`: one linear map, `adaptor`: linear maps and convolutions, for 512 px), or a linear map per token (`tokens`).
Wide features (T5) are compressed first. B batch, N tokens, D width, C channels, H W height width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.layers import Attention
from crossflow.networks.text.encoders import attendable

NUM_REDUCTIONS = 3
Head = Literal["flatten", "adaptor", "tokens"]


class UnbiasedNorm(nn.Module):
    """g (x - mean) / (std + 1e-5) + b over the last axis, with the unbiased standard deviation: not a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        normed = (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + 1e-5)
        return (self.g * normed + self.b).to(x.dtype)


class PostNormLayer(nn.Module):
    """x (B, N, D): x = norm(x + attn(x)); x = norm(x + ff(x)); with `narrow_to`, a linear map D -> narrow_to follows.

    The mask hides keys; what stands at padded positions is computed like any other token, and is not zeroed.
    """

    def __init__(self, width: int, hidden: int, heads: int, dropout: float, narrow_to: int | None = None) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = UnbiasedNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm2 = UnbiasedNorm(width)
        self.narrow = nn.Linear(width, narrow_to) if narrow_to is not None else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
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
        self.fc1, self.norm1 = nn.Linear(num_inputs, area), nn.LayerNorm(area)
        self.fc2, self.norm2 = nn.Linear(area, area), nn.LayerNorm(area)
        self.conv1, self.norm3 = nn.Conv2d(1, 32, 3, padding=1), nn.LayerNorm([32, height, width])
        self.conv2, self.norm4 = nn.Conv2d(32, 64, 3, padding=1), nn.LayerNorm([64, height, width])
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.grid = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.fc1(x)))
        x = torch.relu(self.norm2(self.fc2(x))).unflatten(1, (1, *self.grid))
        x = torch.relu(self.norm3(self.conv1(x)))
        return self.conv3(torch.relu(self.norm4(self.conv2(x))))


class TextVariationalTrunk(nn.Module):
    """Features (B, N, D') and mask (B, N) -> (B, 2, *latent), mean and log-variance, for core's SourceEncoder.

    latent_shape: (C, H, W), or (N, C) with the head `tokens`; num_tokens: N; width: D of the layers, with a
    `Compressor` in front where it is not the features' own; hidden: of the feed-forwards.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        *,
        feature_width: int,
        num_tokens: int,
        width: int,
        depth: int,
        hidden: int,
        heads: int,
        head: Head,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.latent_shape, self.num_tokens = tuple(latent_shape), num_tokens
        by_token = head == "tokens"
        narrowed = width if by_token else width // 2**NUM_REDUCTIONS
        if by_token != (len(latent_shape) == 2) or (by_token and latent_shape[0] != num_tokens):
            raise UserError(
                f"The head {head!r} of {num_tokens} tokens cannot make a latent {tuple(latent_shape)}: tokens makes "
                "(N, C), of as many tokens; flatten and adaptor make (C, H, W)."
            )
        if width % heads or narrowed * (1 if by_token else 2) % heads:
            raise UserError(
                f"source.width = {width} narrows to {narrowed}, which source.heads = {heads} must divide all along."
            )
        self.compressor = Compressor(feature_width, width) if feature_width != width else None
        self.layers = nn.ModuleList(PostNormLayer(width, hidden, heads, dropout) for _ in range(depth))
        widths = [] if by_token else [width // 2**i for i in range(NUM_REDUCTIONS)]
        self.reductions = nn.ModuleList(PostNormLayer(one, hidden, heads, dropout, one // 2) for one in widths)
        self.by_token = by_token
        if head == "adaptor":
            channels, height, columns = latent_shape
            self.head: nn.Module = Adaptor(num_tokens * narrowed, 2 * channels, height, columns)
        else:
            self.head = nn.Linear(narrowed if by_token else num_tokens * narrowed, self._num_outputs(latent_shape))

    def _num_outputs(self, latent_shape: tuple[int, ...]) -> int:
        return 2 * latent_shape[1] if self.by_token else 2 * math.prod(latent_shape)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if features.shape[1] != self.num_tokens:
            raise UserError(
                f"This text encoder reads {self.num_tokens} tokens, and {features.shape[1]} came. Pad or cut to that."
            )
        x = features if self.compressor is None else self.compressor(features)
        # FlowTok's encoder sees the padding too; its release gives it no mask.
        seen = None if mask is None or self.by_token else attendable(mask.bool())
        for layer in [*self.layers, *self.reductions]:
            x = layer(x, seen)
        if self.by_token:
            return torch.stack(self.head(x).chunk(2, dim=-1), dim=1)  # (B, N, 2 C) -> (B, 2, N, C)
        return self.head(x.flatten(1)).flatten(1).unflatten(1, (2, *self.latent_shape))


class ImageHead(nn.Module):
    """The image embedding (B, F) -> (B, num_values): Linear to 4 F, exact GELU, LayerNorm, Linear (256 px)."""

    def __init__(self, width: int, num_values: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width)
        self.fc2 = nn.Linear(4 * width, num_values)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(nn.functional.gelu(self.fc1(x))))


def token_head(width: int, channels: int, hidden: int = 512) -> nn.Sequential:
    """Per token (B, N, D) -> (B, N, C): three linear maps, SiLU after the first two (FlowTok's alignment)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
    )
