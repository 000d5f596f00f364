"""How a backbone reads a jump, and the condition of the noise-source baselines. B batch, M tokens, D width, C channels,
H W.
"""

import torch
from torch import Tensor, nn

from crossflow.core.batch import Condition, Jump
from crossflow.core.config import BackboneConfig
from crossflow.core.layers import TimestepEmbedding

SMOOTH = 8.0
"""Time scale of the embedding of a jump: small, since targets of flow maps differentiate by time."""


class JumpEmbedding(nn.Module):
    """What a jump adds to the conditioning of a network: an embedding of its length (condition `added`) and one of
    log w, where the network takes the guidance scale. Both are zero at first, so that a trained network stays as it is.
    """

    def __init__(self, width: int, config: BackboneConfig) -> None:
        super().__init__()
        self.length = TimestepEmbedding(width, SMOOTH) if config.interval == "added" else None
        self.scale = TimestepEmbedding(width, SMOOTH) if config.guided else None

    def start_at_zero(self) -> None:
        """Zeroes the last layers; called after the network has initialised its own."""
        for embedding in (self.length, self.scale):
            if embedding is not None:
                for parameter in embedding.mlp[2].parameters():
                    nn.init.zeros_(parameter)

    def forward(self, t: Tensor, jump: Jump | None) -> Tensor | float:
        """t (B,) -> (B, D), or 0 without embeddings; jump: None for one that ends at t, unguided."""
        length, scale = (torch.zeros_like(t), torch.ones_like(t)) if jump is None else (jump.end - t, jump.scale)
        total: Tensor | float = 0.0
        if self.length is not None:
            total = total + self.length(length)
        return total if self.scale is None else total + self.scale(scale.log())


def context_tokens(
    null: Tensor | None, condition: Condition | None, unconditional: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of cross-attention: a learned null token (1, 1, D), then the condition's tokens.

    Returns tokens (B, M + 1, D) and their mask (B, M + 1) bool, True = attended; samples that are `unconditional` (B,)
    attend only to the null token. Both are None for a backbone without cross-attention (null is None).
    """
    if null is None:
        return None, None
    assert condition is not None, "cross-attention needs a condition"
    assert condition.tokens is not None, "cross-attention needs condition tokens"
    tokens, mask = condition.tokens, condition.mask
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    attended = torch.cat([torch.ones_like(mask[:, :1]), mask & ~unconditional[:, None]], dim=1)
    return torch.cat([null.expand(tokens.shape[0], -1, -1), tokens.to(null.dtype)], dim=1), attended


def with_grid(z_t: Tensor, condition: Condition | None, unconditional: Tensor, grid_channels: int) -> Tensor:
    """z_t (B, C, H, W) with the condition's grid as further channels, zero where a sample is unconditional."""
    if not grid_channels:
        return z_t
    grid = None if condition is None else condition.grid
    assert grid is not None, "this backbone needs a condition grid"
    return torch.cat([z_t, grid * ~unconditional[:, None, None, None]], dim=1)
