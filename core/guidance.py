"""Guidance: the indicator of CrossFlow section 4.3 in training and sampling, and autoguidance.

A guided velocity is again a function (z, t) -> velocity: the solver sees neither condition nor scale. B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossflow.core.batch import Condition
from crossflow.core.distributed import gather, rank
from crossflow.core.model import CrossFlow, as_flags
from crossflow.core.paths import expand
from crossflow.core.solvers import Velocity

TIME_TOLERANCE = 1e-6
"""The times of a grid, such as 0.7, are rounded to float32."""


def draw_unconditional(uniform: Tensor, drop: float) -> Tensor:
    """Which samples are unconditional: uniform (B,) in [0, 1) over this rank -> (B,) bool, with probability `drop`.

    If only one sample of the whole batch (all ranks) was drawn, it stays conditional: it has no other target to take.
    """
    drawn = uniform < drop
    return drawn & (gather(drawn).sum() > 1)


def rotate_targets(target: Tensor, weight: Tensor | None, unconditional: Tensor) -> tuple[Tensor, Tensor | None]:
    """Targets (and weights) of the unconditional samples rotated among them, over all ranks; the others keep theirs.

    target (B, *latent), weight (B, ...), unconditional (B,) bool. A rotated target brings no gradient to its origin.
    """
    everywhere = gather(unconditional)
    if not everywhere.any():
        return target, weight
    drawn = everywhere.nonzero().squeeze(1)  # global rows
    takes_from = torch.arange(len(everywhere), device=target.device)
    takes_from[drawn] = drawn.roll(1)
    here = takes_from[rank() * len(target) : (rank() + 1) * len(target)]

    def rotated(own: Tensor) -> Tensor:
        return torch.where(expand(unconditional, own), gather(own)[here], own)

    return rotated(target), None if weight is None else rotated(weight)


@dataclass(frozen=True)
class Guidance:
    """How a velocity is guided, and at which times.

    >>> guidance = Guidance(scale=4.0, interval=(0.0, 0.5), zero_until=0.02)
    >>> [guidance.evaluations(t) for t in (0.0, 0.02, 0.5, 0.6)]
    [0, 2, 2, 1]

    Attributes:
        scale: w of v_uncond + w (v_cond - v_uncond), or of the weaker model in place of the unconditional one; 1: none.
        interval: guidance acts at interval[0] <= t <= interval[1], elsewhere the velocity is the conditional one
            (Kynkaanniemi et al. 2024).
        zero_until: the velocity is zero at t < zero_until.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    zero_until: float = 0.0

    def velocity(self, model: CrossFlow, condition: Condition | None = None, weak: CrossFlow | None = None) -> Velocity:
        """The velocity of `model` guided by its indicator, or by `weak`; conditions are encoded once, here."""
        encoded = model.encode_condition(condition)
        if weak is not None:
            velocity = autoguidance(model, weak, self.scale, encoded, weak.encode_condition(condition), self.interval)
        else:
            velocity = indicator_guidance(model, self.scale, encoded, self.interval)
        return zero_init(velocity, self.zero_until) if self.zero_until > 0 else velocity

    def evaluations(self, t: float) -> int:
        """Network evaluations in a call of `velocity` at time t: 0 while it is zero, 2 where guidance acts, else 1.

        Conditional and unconditional velocity count apart, although one forward pass of twice the batch gives both.
        """
        if _before(t, self.zero_until):
            return 0
        return 2 if self.scale != 1 and _within(t, self.interval) else 1


def _doubled(condition: Condition | None) -> Condition | None:
    """The condition twice, for a batch of 2B."""
    if condition is None:
        return None
    twice = {
        name: None if (x := getattr(condition, name)) is None else torch.cat([x, x])
        for name in ("tokens", "mask", "grid")
    }
    return Condition(**twice)


def _within(t: Tensor | float, interval: tuple[float, float]) -> bool:
    """Whether interval[0] <= t <= interval[1]."""
    if interval[0] <= 0 and interval[1] >= 1:
        return True  # without copying t from the device
    return interval[0] - TIME_TOLERANCE <= float(t) <= interval[1] + TIME_TOLERANCE


def _before(t: Tensor | float, end: float) -> bool:
    """Whether t < end; end = k / N excludes the step at k / N, whose float32 time may lie below it."""
    return float(t) < end - TIME_TOLERANCE


def plain(model: CrossFlow, condition: Condition | None = None) -> Velocity:
    """The conditional velocity."""
    return lambda z, t: model.velocity(z, t.expand(len(z)), as_flags(False, z), condition)


def indicator_guidance(
    model: CrossFlow, scale: float, condition: Condition | None = None, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond) inside the interval, both from one batched forward of 2B samples."""
    conditional = plain(model, condition)
    if scale == 1:
        return conditional
    doubled = _doubled(condition)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if not _within(t, interval):
            return conditional(z, t)
        flags = torch.cat([as_flags(False, z), as_flags(True, z)])
        both = model.velocity(torch.cat([z, z]), t.expand(2 * len(z)), flags, doubled)
        v_cond, v_uncond = both.chunk(2)
        return v_uncond + scale * (v_cond - v_uncond)

    return velocity


def autoguidance(
    model: CrossFlow,
    weak: CrossFlow,
    scale: float,
    condition: Condition | None = None,
    weak_condition: Condition | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """v_weak + scale (v - v_weak) inside the interval, v_weak of an under-trained version of the same model (Karras et
    al. 2024); outside it the velocity is the model's own.
    """
    strong, inferior = plain(model, condition), plain(weak, weak_condition)
    if scale == 1:
        return strong

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if not _within(t, interval):
            return strong(z, t)
        v_weak = inferior(z, t)
        return v_weak + scale * (strong(z, t) - v_weak)

    return velocity


def zero_init(velocity: Velocity, until: float) -> Velocity:
    """The velocity, zero at t < until (the first steps; CFG-Zero*, Fan et al. 2025)."""
    return lambda z, t: torch.zeros_like(z) if _before(t, until) else velocity(z, t)
