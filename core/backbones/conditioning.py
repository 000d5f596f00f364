"""How a backbone reads the condition of the noise-source baselines. B batch, M tokens, D width, C channels, H W."""

import torch
from torch import Tensor

from crossflow.core.batch import Condition


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
    return torch.cat([null.expand(len(tokens), -1, -1), tokens.to(null.dtype)], dim=1), attended


def with_grid(z_t: Tensor, condition: Condition | None, unconditional: Tensor, grid_channels: int) -> Tensor:
    """z_t (B, C, H, W) with the condition's grid as further channels, zero where a sample is unconditional."""
    if not grid_channels:
        return z_t
    grid = None if condition is None else condition.grid
    assert grid is not None, "this backbone needs a condition grid"
    return torch.cat([z_t, grid * ~unconditional[:, None, None, None]], dim=1)
