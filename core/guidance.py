"""Guidance: the indicator of CrossFlow section 4.3 in training and sampling, and autoguidance.

A guided velocity is again a function (z, t) -> velocity: the solver sees neither condition nor scale. B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossflow.core.batch import Condition, Jump
from crossflow.core.distributed import gather, rank, world_size
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow, as_flags, as_times
from crossflow.core.paths import expand
from crossflow.core.solvers import Velocity

TIME_TOLERANCE = 1e-6
"""Tolerance of comparisons of times: those of a grid are sums of rounded step lengths."""


def draw_unconditional(uniforms: Sequence[Tensor], drop: float) -> list[Tensor]:
    """Which samples of an optimizer step are unconditional, with probability `drop`.

    uniforms: (B,) in [0, 1) for each part of this process's share -> (B,) bool for each. If only one sample of the
    whole step (all parts and processes) is drawn, it stays conditional, since there is no other target for it.
    """
    drawn = [uniform < drop for uniform in uniforms]
    enough = gather(torch.cat(drawn)).sum() > 1
    return [flags & enough for flags in drawn]


def rotate_targets(targets: Sequence[Tensor], unconditional: Sequence[Tensor]) -> list[Tensor]:
    """Targets, or weights, with those of an optimizer step's unconditional samples rotated among these samples.

    targets (B, ...) and unconditional (B,) bool for each part of this process's share. The rotation goes over all parts
    and processes, in the order that the samples have in one batch, so it does not depend on how the step is divided.
    Gradients do not flow through rotated targets.

    >>> flags = torch.tensor([True, False, True, True])
    >>> rotate_targets([torch.tensor([10, 11, 12, 13])], [flags])[0].tolist()
    [13, 11, 10, 12]
    """
    # Each unconditional sample takes the target of the one before it, so a part needs a single target from elsewhere:
    # the last unconditional one of the nearest part before it, cyclically, that has any.
    ends = [_last(flags) for flags in unconditional]
    occupied = _in_order([end >= 0 for end in ends])
    offered = _in_order([target.index_select(0, end.clamp(min=0)) for target, end in zip(targets, ends, strict=True)])
    before = _previous(occupied)
    sources = torch.where(before < 0, _last(occupied), before).clamp(min=0)
    rotated = []
    for part, (target, flags) in enumerate(zip(targets, unconditional, strict=True)):
        number, inside = part * world_size() + rank(), _previous(flags)
        from_outside = offered.index_select(0, sources[number : number + 1])
        other = target.detach().index_select(0, inside.clamp(min=0))
        other = torch.where(expand(inside < 0, target), from_outside, other)
        rotated.append(torch.where(expand(flags, target), other, target))
    return rotated


def _positions(flags: Tensor) -> Tensor:
    """Each flag's own index where it is set, -1 elsewhere: (N,) bool -> (N,) int64."""
    return torch.where(flags, torch.arange(len(flags), device=flags.device), -1)


def _last(flags: Tensor) -> Tensor:
    """The index of the last flag that is set, -1 without any: (N,) bool -> (1,) int64."""
    return _positions(flags).amax(0, keepdim=True)


def _previous(flags: Tensor) -> Tensor:
    """For each place the index of the nearest flag before it that is set, -1 without any: (N,) bool -> (N,) int64."""
    return F.pad(_positions(flags).cummax(0).values[:-1], (1, 0), value=-1)


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    """One row (1, ...) of each part on all processes, ordered by part and then by rank; without gradients."""
    by_rank = gather(torch.cat(list(parts))).unflatten(0, (world_size(), len(parts)))
    return by_rank.transpose(0, 1).flatten(0, 1)


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
        """The velocity of `model`, guided by its indicator or by `weak`; encodes the condition once."""
        encoded = model.encode_condition(condition)
        if weak is not None:
            velocity = autoguidance(model, weak, self.scale, encoded, weak.encode_condition(condition), self.interval)
        else:
            velocity = indicator_guidance(model, self.scale, encoded, self.interval)
        return zero_init(velocity, self.zero_until) if self.zero_until > 0 else velocity

    def jumps(self, model: CrossFlow, condition: Condition | None = None) -> Velocity:
        """The average velocity (z, t, s) of a flow map, whose guidance is built in: its scale is an input or fixed.

        Raises UserError for a model that is no flow map, and for guidance that it does not take.
        """
        if not model.jumps:
            raise UserError(
                "The solver map needs a flow map, and this model was trained for small steps only. Use another solver, "
                "or train a flow map from it with `crossflow distill`."
            )
        if self.scale != 1 and not model.takes_scale:
            raise UserError(
                f"guidance = {self.scale:g} cannot be applied: the guidance of this flow map is built in. Leave "
                "guidance at 1, or distil with a range: interval.guidance=[1,8]."
            )
        if self.interval != (0.0, 1.0) or self.zero_until > 0:
            raise UserError(
                "guidance_interval and zero_init act on single steps of a velocity, which a flow map does not take: "
                "leave them out. Set interval.guidance_interval when distilling instead."
            )
        encoded = model.encode_condition(condition)

        def average(z: Tensor, t: float, s: float) -> Tensor:
            jump = Jump(as_times(s, z), as_times(max(self.scale, 1e-6), z))
            return model.velocity(z, as_times(t, z), as_flags(False, z), encoded, jump)

        return average

    def evaluations(self, t: float) -> int:
        """Network evaluations in a call of `velocity` at time t: 0 while it is zero, 2 where guidance acts, else 1.

        Conditional and unconditional velocity count separately, although one pass of twice the batch gives both.
        """
        if _before(t, self.zero_until):
            return 0
        return 2 if self.scale != 1 and _within(t, self.interval) else 1


def _doubled(condition: Condition | None) -> Condition | None:
    """The condition repeated, for a batch of 2B."""
    if condition is None:
        return None
    twice = {
        name: None if (x := getattr(condition, name)) is None else torch.cat([x, x])
        for name in ("tokens", "mask", "grid")
    }
    return Condition(**twice)


def _within(t: float, interval: tuple[float, float]) -> bool:
    """Whether interval[0] <= t <= interval[1]."""
    return interval[0] - TIME_TOLERANCE <= t <= interval[1] + TIME_TOLERANCE


def _before(t: float, end: float) -> bool:
    """Whether t < end; end = k / N excludes the step at k / N, whose rounded time may lie below it."""
    return t < end - TIME_TOLERANCE


def plain(model: CrossFlow, condition: Condition | None = None) -> Velocity:
    """The conditional velocity."""
    return lambda z, t: model.velocity(z, as_times(t, z), as_flags(False, z), condition)


def indicator_guidance(
    model: CrossFlow, scale: float, condition: Condition | None = None, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond) inside the interval, both from one batched forward of 2B samples."""
    if scale == 1:
        return plain(model, condition)
    doubled = _doubled(condition)

    def velocity(z: Tensor, t: float) -> Tensor:
        if not _within(t, interval):
            return model.velocity(z, as_times(t, z), as_flags(False, z), condition)
        twice, flags = torch.cat([z, z]), torch.cat([as_flags(False, z), as_flags(True, z)])
        both = model.velocity(twice, as_times(t, twice), flags, doubled)
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
    if scale == 1:
        return plain(model, condition)

    def velocity(z: Tensor, t: float) -> Tensor:
        times, flags = as_times(t, z), as_flags(False, z)
        v = model.velocity(z, times, flags, condition)
        if not _within(t, interval):
            return v
        v_weak = weak.velocity(z, times, flags, weak_condition)
        return v_weak + scale * (v - v_weak)

    return velocity


def zero_init(velocity: Velocity, until: float) -> Velocity:
    """The velocity, zero at t < until (the first steps; CFG-Zero*, Fan et al. 2025)."""
    return lambda z, t: torch.zeros_like(z) if _before(t, until) else velocity(z, t)
