"""A flow reversed in time: text-to-image becomes image-to-text (CrossFlow-T2I of Table 4)."""

import torch
from torch import Tensor, nn

from crossflow.core.batch import Condition


class TimeReversal(nn.Module):
    """The backbone whose velocity at (z, t) is -v(z, 1 - t), for a backbone of velocity v."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.backbone.set_checkpointing(on)  # type: ignore[operator]

    def forward(
        self, z_t: Tensor, t: Tensor, unconditional: Tensor, condition: Condition | None = None
    ) -> list[Tensor]:
        """z_t (B, *latent), t (B,) in [0, 1], unconditional (B,) bool -> velocities (B, *latent), coarse to fine."""
        return [torch.neg(velocity) for velocity in self.backbone(z_t, 1 - t, unconditional, condition)]
