"""Text trunks: token ids, or features of a frozen text encoder, -> mean and log-variance of a latent of any shape.

The trunk of a text source encoder (CrossFlow section 4.1): a small pre-norm transformer over the tokens, then a head
that turns N tokens into a latent (C, H, W) or (N', C). Padding is masked everywhere and has no influence.
B batch, N tokens, D width, C channels, H W height width, M queries.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.layers import SampleLinear, TransformerLayer, sincos_2d, sincos_tokens, unpatchify

MAX_QUERIES = 64  # at this number a query head costs about as much as a backbone of the same width on patches of 4


class TextTransformer(nn.Module):
    """Tokens -> contextual tokens (B, N, D): embedding or projection, learned positions, pre-norm layers, final norm.

    Set exactly one of vocab_size (input: ids) and feature_width (input: frozen features of that width).
    max_length: maximum number of tokens N; width: D, a multiple of heads.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        feature_width: int | None = None,
        max_length: int = 77,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        assert (vocab_size is None) != (feature_width is None), "a text trunk reads either ids or features"
        self.max_length, self.width, self.heads = max_length, width, heads
        self.feature_width = feature_width
        if feature_width is None:
            assert vocab_size is not None
            self.embed: nn.Module = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.embed.weight, std=0.5)
        else:
            # Frozen features come in any scale (T5's are 0.1, a decoder's 10), so they are normalised first.
            self.embed = nn.Sequential(nn.LayerNorm(feature_width), nn.Linear(feature_width, width))
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.1)
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """ids (B, N) int64 or features (B, N, D'), and mask (B, N) bool, True = token -> (B, N, D).

        Raises UserError if N exceeds max_length.
        """
        if features.shape[1] > self.max_length:
            raise UserError(
                f"This text trunk takes at most {self.max_length} tokens, got {features.shape[1]}. Tokenize with that "
                "max_length, or train a trunk with a larger one."
            )
        x = self.embed(features) + self.positions[: features.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class TextTrunk(nn.Module):
    """Text -> (B, 2, *latent): `[:, 0]` the mean, `[:, 1]` the log-variance, as core's SourceEncoder reads them.

    latent_shape: (C, H, W) or (N', C); transformer: reads the tokens. head: "queries": learned queries, one per patch
    of the latent, attend to the tokens (`head_depth` layers) and each predicts its patch; "flatten": all tokens in one
    vector and one linear map, as released (2 C H W x N D / 8 weights). patch: side of a query's patch, 0 = the smallest
    that leaves at most 64 queries; for (N', C) one query per token. Raises UserError for other shapes, heads and
    patches.

    >>> import torch
    >>> from crossflow.core.source import SourceEncoder
    >>> trunk = TextTrunk((4, 8, 8), TextTransformer(vocab_size=300, max_length=16, width=32))
    >>> ids, mask = torch.zeros(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.bool)
    >>> tuple(trunk(ids, mask).shape)
    (2, 2, 4, 8, 8)
    >>> posterior = SourceEncoder(trunk, "variational", (4, 8, 8))(ids, mask)
    >>> tuple(posterior.sample().shape)
    (2, 4, 8, 8)
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        transformer: TextTransformer,
        *,
        head: Literal["queries", "flatten"] = "queries",
        head_depth: int = 2,
        patch: int = 0,
    ) -> None:
        super().__init__()
        if len(latent_shape) not in (2, 3):
            raise UserError(f"The latent of a text trunk must be (C, H, W) or (N, C), got {tuple(latent_shape)}.")
        self.transformer = transformer
        if head == "queries":
            queries = QueryHead(latent_shape, transformer.width, transformer.heads, head_depth, patch)
            with torch.no_grad():
                # The mean starts near 2, with a deviation of 1: a flow reads the text from z0 alone, and a mean below
                # the noise would teach it nothing.
                queries.out.weight[: len(queries.out.weight) // 2] *= 3
            self.head: nn.Module = queries
        elif head == "flatten":
            self.head = FlattenHead(latent_shape, transformer.width, transformer.max_length)
        else:
            raise UserError(f"The head of a text trunk must be queries or flatten, got {head!r}.")

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, N) int64 or features (B, N, D') and mask (B, N) bool, True = token -> (B, 2, *latent)."""
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        mask = attendable(mask)
        return self.head(self.transformer(features, mask), mask)


class QueryHead(nn.Module):
    """M learned queries with cross-attention to the tokens; query m predicts both moments of patch m of the latent."""

    def __init__(self, latent_shape: tuple[int, ...], width: int, heads: int, depth: int, patch: int = 0) -> None:
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        if len(latent_shape) == 3:
            channels, height, rows = latent_shape
            self.patch = patch or smallest_patch(height, rows, MAX_QUERIES)
            if height % self.patch or rows % self.patch:
                raise UserError(f"A patch of {self.patch} does not divide a latent of {height} x {rows}.")
            grid = (height // self.patch, rows // self.patch)
            self.grids = {"queries": grid}
            positions = sincos_2d(*grid, 4 * math.ceil(width / 4))[:, :width]
            out = 2 * channels * self.patch**2
        else:
            positions = sincos_tokens(latent_shape[0], 2 * math.ceil(width / 2))[:, :width]
            out = 2 * latent_shape[1]
        self.queries = nn.Parameter(positions + 0.02 * torch.randn(positions.shape))
        self.layers = nn.ModuleList(TransformerLayer(width, heads, context_dim=width) for _ in range(max(1, depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, N, D), mask (B, N) bool -> (B, 2, *latent)."""
        x = self.queries.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            x = layer(x, context=tokens, context_mask=mask)
        moments = self.out(self.norm(x)).chunk(2, dim=-1)  # two of (B, M, C p p)
        if len(self.latent_shape) == 3:
            height, width = self.latent_shape[1:]
            moments = tuple(unpatchify(part, self.patch, height, width) for part in moments)
        return torch.stack(moments, dim=1)


class FlattenHead(nn.Module):
    """Tokens narrowed to D / 8, flattened, then one linear map to both moments; padded positions are zero."""

    def __init__(self, latent_shape: tuple[int, ...], width: int, max_length: int) -> None:
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.max_length = max_length
        narrow = max(1, width // 8)
        self.narrow = nn.Linear(width, narrow)
        self.out = SampleLinear(max_length * narrow, 2 * math.prod(latent_shape))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, N, D), mask (B, N) bool -> (B, 2, *latent)."""
        x = self.narrow(tokens) * mask[..., None]
        x = F.pad(x, (0, 0, 0, self.max_length - x.shape[1]))
        return self.out(x.flatten(1)).unflatten(1, (2, *self.latent_shape))


def attendable(mask: Tensor) -> Tensor:
    """`mask` (B, N) in which a row without tokens attends to its first position: a softmax over nothing is NaN."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return mask | (first & ~mask.any(dim=1, keepdim=True))


def smallest_patch(height: int, width: int, max_patches: int) -> int:
    """The smallest side that divides height and width into at most `max_patches` patches; their greatest common
    divisor if none does.
    """
    common = math.gcd(height, width)
    sides = [side for side in range(1, common + 1) if common % side == 0]
    return next((side for side in sides if (height // side) * (width // side) <= max_patches), common)
