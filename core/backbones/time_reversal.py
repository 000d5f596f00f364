"""A flow reversed in time: text-to-image becomes image-to-text (CrossFlow-T2I of Table 4)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from crossflow.core.batch import Condition, Jump


class TimeReversal(nn.Module):
    """The backbone whose velocity at (z, t) is -v(z, 1 - t), for a backbone of velocity v; its jump from t to s is that
    of the backbone from 1 - t to 1 - s.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.backbone.set_checkpointing(on)  # type: ignore[operator]

    @property
    def jumps(self) -> bool:
        """Whether the backbone is a flow map."""
        return getattr(self.backbone, "jumps", False)

    @property
    def takes_scale(self) -> bool:
        """Whether the guidance scale of a jump is an input of the backbone."""
        return getattr(self.backbone, "takes_scale", False)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        unconditional: Tensor,
        condition: Condition | None = None,
        jump: Jump | None = None,
    ) -> list[Tensor]:
        """z_t (B, *latent), t (B,) in [0, 1], unconditional (B,) bool -> velocities (B, *latent), coarse to fine."""
        more = () if jump is None else (replace(jump, end=1 - jump.end),)
        return [torch.neg(velocity) for velocity in self.backbone(z_t, 1 - t, unconditional, condition, *more)]
