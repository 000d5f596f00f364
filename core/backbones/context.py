"""The condition tokens of the noise-source baselines as cross-attention sees them. B batch, M tokens, D width."""

import torch
from torch import Tensor

from crossflow.core.batch import Condition


def seen_context(
    null: Tensor | None, condition: Condition | None, unconditional: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Condition tokens behind a learned null token (1, 1, D), and what is seen of them: the null token alone where a
    sample is unconditional. (B, M + 1, D) and (B, M + 1) bool; two None for a backbone without cross-attention.
    """
    if null is None:
        return None, None
    tokens = None if condition is None else condition.tokens
    assert condition is not None
    assert tokens is not None, "cross-attention needs condition tokens"
    mask = condition.mask
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    seen = torch.cat([torch.ones_like(mask[:, :1]), mask & ~unconditional[:, None]], dim=1)
    return torch.cat([null.expand(len(tokens), -1, -1), tokens.to(null.dtype)], dim=1), seen


def with_grid(z_t: Tensor, condition: Condition | None, unconditional: Tensor, grid_channels: int) -> Tensor:
    """z_t (B, C, H, W) with the condition's grid as further channels, zero where a sample is unconditional."""
    if not grid_channels:
        return z_t
    given = None if condition is None else condition.grid
    assert given is not None, "this backbone needs a condition grid"
    return torch.cat([z_t, given * ~unconditional[:, None, None, None]], dim=1)
