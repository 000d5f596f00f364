"""Losses of estimated depth in metres, for end-to-end training. B batch."""

import torch
from torch import Tensor, nn

from crossflow.core.batch import Batch
from crossflow.core.errors import unknown_name
from crossflow.tasks.depth.decoder import DepthScale

NAMES = ("abs_rel", "affine")


def abs_rel(depth: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean of |d - g| / g where weight is 1; depth, truth, weight (B, N) in metres -> (B,), 0 without any."""
    error = (depth - truth).abs() / truth.clamp(min=1e-6)
    return (weight * error).sum(1) / weight.sum(1).clamp(min=1e-6)


def affine(depth: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean of |a d + b - g| in units of the mean deviation of g, with the scale a and shift b of least squares for each
    picture (MiDaS; Garcia et al. 2025): unchanged by scale and shift of the depth. Arguments as for `abs_rel`.
    """
    total = weight.sum(1, keepdim=True).clamp(min=1e-6)
    middle, centre = ((weight * values).sum(1, keepdim=True) / total for values in (depth, truth))
    d, g = weight * (depth - middle), weight * (truth - centre)
    spread = d.square().sum(1, keepdim=True)
    # A constant estimate has no scale; it is compared with the mean.
    scale = torch.where(spread > 1e-8 * total, (d * g).sum(1, keepdim=True) / spread.clamp(min=1e-12), 0.0)
    unit = g.abs().sum(1, keepdim=True) / total
    return ((scale * d - g).abs().sum(1, keepdim=True) / total / unit.clamp(min=1e-3)).squeeze(1)


class DepthLoss(nn.Module):
    """`abs_rel` or `affine` of the depth of latents. Raises UserError for another name."""

    def __init__(self, scale: DepthScale, name: str) -> None:
        super().__init__()
        if name not in NAMES:
            raise unknown_name("loss.decoded of the task depth", name, NAMES)
        self.scale, self.measure = scale, abs_rel if name == "abs_rel" else affine

    def forward(self, z1: Tensor, batch: Batch) -> Tensor:
        """z1 (B, 1, H, W) -> (B,)."""
        weight = torch.ones_like(batch.target) if batch.weight is None else batch.weight
        depths = self.scale.metres(z1), self.scale.metres(batch.target), weight.float().expand_as(z1)
        return self.measure(*(values.flatten(1) for values in depths))
