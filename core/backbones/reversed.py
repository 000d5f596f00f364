"""The same flow in the other direction of time: text-to-image run backwards is image-to-text (CrossFlow-T2I of Table
4).
"""

import torch
from torch import Tensor, nn

from crossflow.core.batch import Condition


class Reversed(nn.Module):
    """Velocities of the time-reversed flow, -v(z, 1 - t), of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def set_checkpointing(self, on: bool) -> None:
        self.backbone.set_checkpointing(on)  # type: ignore[operator]

    def forward(
        self, z_t: Tensor, t: Tensor, unconditional: Tensor, condition: Condition | None = None
    ) -> list[Tensor]:
        return [torch.neg(velocity) for velocity in self.backbone(z_t, 1 - t, unconditional, condition)]
