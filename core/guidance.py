"""Guidance: the indicator of CrossFlow section 4.3 in training and sampling, and autoguidance.

A guided velocity is again a function (z_t, t) -> velocity; the solver never hears of conditions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crossflow.core.batch import Condition
from crossflow.core.distributed import gather, rank
from crossflow.core.model import CrossFlow, as_flags
from crossflow.core.paths import expand

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(z (B, *latent), t scalar tensor) -> dz/dt (B, *latent)."""


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


def _halves(condition: Condition | None) -> Condition | None:
    if condition is None:
        return None
    twice = {
        name: None if (x := getattr(condition, name)) is None else torch.cat([x, x])
        for name in ("tokens", "mask", "grid")
    }
    return Condition(**twice)


def _within(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether interval[0] <= t <= interval[1]; the times of a grid, such as 0.7, are rounded to float32."""
    if interval[0] <= 0 and interval[1] >= 1:
        return True  # without asking the device for t
    return interval[0] - 1e-6 <= float(t) <= interval[1] + 1e-6


def plain(model: CrossFlow, condition: Condition | None = None) -> Velocity:
    """The conditional velocity."""
    return lambda z, t: model.velocity(z, t.expand(len(z)), as_flags(False, z), condition)


def indicator_guidance(
    model: CrossFlow, scale: float, condition: Condition | None = None, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond), both from one batched forward of 2B samples.

    Guidance acts at interval[0] <= t <= interval[1] (Kynkaanniemi et al. 2024), elsewhere the velocity is conditional.
    """
    if scale == 1:
        return plain(model, condition)
    twice = _halves(condition)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if not _within(t, interval):
            return model.velocity(z, t.expand(len(z)), as_flags(False, z), condition)
        flags = torch.cat([as_flags(False, z), as_flags(True, z)])
        both = model.velocity(torch.cat([z, z]), t.expand(2 * len(z)), flags, twice)
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return velocity


def autoguidance(
    model: CrossFlow,
    weak: CrossFlow,
    scale: float,
    condition: Condition | None = None,
    weak_condition: Condition | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """v_weak + scale (v - v_weak) with an under-trained version of the same model (Karras et al. 2024).

    Guidance acts at interval[0] <= t <= interval[1], outside it the velocity is the model's own.
    """
    strong, poor = plain(model, condition), plain(weak, weak_condition)
    if scale == 1:
        return strong

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if not _within(t, interval):
            return strong(z, t)
        v_weak = poor(z, t)
        return v_weak + scale * (strong(z, t) - v_weak)

    return velocity


def zero_init(velocity: Velocity, until: float) -> Velocity:
    """Sets the velocity to zero at t < until (the first steps; CFG-Zero*, Fan et al. 2025)."""
    # until = k / N must not take in the step at k / N, whose float32 time may lie below it
    return lambda z, t: torch.zeros_like(z) if float(t) < until - 1e-6 else velocity(z, t)
