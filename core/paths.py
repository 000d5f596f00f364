"""Probability paths from source to target, and the distributions of training time.

Linear (CrossFlow eq. 1-2): z_t = t z1 + (1 - (1 - s) t) z0,  u = z1 - (1 - s) z0.
Sin-cos (stochastic interpolants): z_t = cos(pi t/2) z0 + sin(pi t/2) z1,  u = (pi/2)(cos(pi t/2) z1 - sin(pi t/2) z0).
t = 0 is the source, t = 1 the target. A bridge adds noise around a path, see `bridge`. B batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from crossflow.core.config import TimeConfig
from crossflow.core.registry import Registry


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many axes as `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class PathPoint:
    """A point of the path and the velocity there; t (B,), z_t and velocity (B, *latent)."""

    t: Tensor
    z_t: Tensor
    velocity: Tensor


class Path(Protocol):
    """(z0 (B, *latent), z1 (B, *latent), t (B,) in [0, 1]) -> the point at t."""

    def __call__(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathPoint: ...

    def end(self, point: PathPoint) -> Tensor:
        """z1 (B, *latent) of the path that passes the point with this velocity."""


PATHS: Registry[Callable[..., Path]] = Registry("path")


@PATHS.register("linear")
@dataclass(frozen=True)
class LinearPath:
    """z_t = t z1 + (1 - (1 - sigma_min) t) z0 (CrossFlow eq. 1-2). z0, z1 (B, *latent), t (B,) in [0, 1].

    >>> point = LinearPath(sigma_min=0)(torch.tensor([[2.0]]), torch.tensor([[6.0]]), t=torch.tensor([0.25]))
    >>> point.z_t, point.velocity
    (tensor([[3.]]), tensor([[4.]]))
    """

    sigma_min: float = 1e-5

    def __call__(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathPoint:
        s = expand(t, z0)
        shrink = 1 - self.sigma_min
        return PathPoint(t, s * z1 + (1 - shrink * s) * z0, z1 - shrink * z0)

    def end(self, point: PathPoint) -> Tensor:
        """z1 (B, *latent) of the path that passes the point with this velocity: z_t + (1 - t) u for sigma_min = 0."""
        shrink = 1 - self.sigma_min
        return shrink * point.z_t + (1 - shrink * expand(point.t, point.z_t)) * point.velocity


@PATHS.register("sincos")
@dataclass(frozen=True)
class SinCosPath:
    """z_t = cos(pi t/2) z0 + sin(pi t/2) z1 (the better row of CrossFlow Table 2). `sigma_min` is unused."""

    sigma_min: float = 0.0

    def __call__(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathPoint:
        angle = expand(t, z0) * (math.pi / 2)
        cos, sin = angle.cos(), angle.sin()
        return PathPoint(t, cos * z0 + sin * z1, (math.pi / 2) * (cos * z1 - sin * z0))

    def end(self, point: PathPoint) -> Tensor:
        """z1 (B, *latent) of the path that passes the point with this velocity: sin z_t + (2/pi) cos u."""
        angle = expand(point.t, point.z_t) * (math.pi / 2)
        return angle.sin() * point.z_t + (2 / math.pi) * angle.cos() * point.velocity


def bridge(point: PathPoint, noise: Tensor, sigma: float) -> PathPoint:
    """The point with sigma sqrt(t (1 - t)) eps added, eps = `noise` (B, *latent) standard normal.

    The velocity stays that of the path, without that of the noise (LBM, Chadebec et al. 2025): what the network learns
    is the mean direction at points around the path, so that one step from t = 0 still ends at E[z1 | z0].
    """
    t = expand(point.t, point.z_t)
    return replace(point, z_t=point.z_t + sigma * (t * (1 - t)).sqrt() * noise)


TimeLaw = Callable[[Tensor, float, float], Tensor]
"""(uniform (B,) in [0, 1), mean, std) -> t (B,) in [0, 1]."""
TIME_LAWS: Registry[TimeLaw] = Registry("time law")


@TIME_LAWS.register("uniform")
def uniform_time(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = u."""
    return uniform


@TIME_LAWS.register("logit_normal")
def logit_normal_time(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std n), n = the normal quantile of the uniform number (Esser et al. 2024)."""
    tiny = torch.finfo(torch.float32).eps
    # In float64, for the tails. Apple's devices have none, so the CPU computes these few numbers for them; elsewhere
    # the copies would make every training step wait.
    device = torch.device("cpu") if uniform.device.type == "mps" else uniform.device
    normal = torch.special.ndtri(uniform.to(device).double().clamp(tiny, 1 - tiny))
    return torch.sigmoid(mean + std * normal).to(uniform.device, uniform.dtype)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Resolution shift t' = a t / (1 + (a - 1) t); a = shift > 1 trains more near the target, 1 changes nothing."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


class TrainingTimes:
    """The distribution of the training time: uniform numbers (B,) in [0, 1) -> t (B,) in [0, 1].

    >>> times = TrainingTimes(TimeConfig(law="uniform", at_start=0.5))
    >>> times(torch.tensor([0.2, 0.5, 0.75]))
    tensor([0.0000, 0.0000, 0.5000])
    """

    def __init__(self, settings: TimeConfig) -> None:
        """Raises UserError for an unknown law."""
        self.settings, self.law = settings, TIME_LAWS.get(settings.law)

    def __call__(self, uniform: Tensor) -> Tensor:
        share = self.settings.at_start
        if share == 0:
            return self._later(uniform)
        if share == 1:
            return torch.zeros_like(uniform)
        rest = ((uniform - share) / (1 - share)).clamp(min=0)
        return torch.where(uniform < share, torch.zeros_like(uniform), self._later(rest))

    def _later(self, uniform: Tensor) -> Tensor:
        """Times of the law, or of the points."""
        if self.settings.points:
            points = torch.tensor(self.settings.points, device=uniform.device, dtype=uniform.dtype)
            return points[(uniform * len(points)).long().clamp(max=len(points) - 1)]
        return shift_time(self.law(uniform, self.settings.mean, self.settings.std), self.settings.shift)
