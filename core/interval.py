"""Few steps: the training targets of a flow map, which jumps along the flow from any time t to any other time s.

    u(z, t, s) = 1 / (s - t) int_t^s v(z_tau, tau) dtau,    z_s = z_t + (s - t) u(z_t, t, s),    u(z, t, t) = v(z, t)

The average velocity u is known by its velocity v and one of two conditions:

    derivative    u = v + (s - t) du/dt, du/dt along the flow with s fixed
                  (MeanFlow, Geng et al. 2025; learned as V = u - (s - t) sg[du/dt] = v, Geng et al. 2025b)
    composition   (s - t) u(z, t, s) = (m - t) u(z, t, m) + (s - m) u(z_m, m, s), m = t + alpha (s - t)
                  (shortcut models, Frans et al. 2025; alpha-Flow, Zhang et al. 2025)

Targets carry no gradient. s may lie before t: then the jump leads backwards. B batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossflow.core.batch import Condition, Jump
from crossflow.core.config import IntervalConfig
from crossflow.core.model import CrossFlow
from crossflow.core.paths import expand

Average = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
"""(z (B, *latent), t (B,), s (B,)) -> u, coarse to fine, the last (B, *latent)."""
MAX_DOUBLINGS = 3
"""Aligned jumps are steps of sampling in 1, 2, 4, ... 2 ** MAX_DOUBLINGS steps."""
FLOOR = 1e-3
"""Added to a sample's loss before it divides the loss, see `interval.power`."""


@dataclass(frozen=True)
class Jumps:
    """The jumps of a batch: t, s (B,) float in [0, 1], the guidance scale (B,), and where s = t: (B,) bool."""

    t: Tensor
    s: Tensor
    scale: Tensor
    is_diagonal: Tensor


def draw_jumps(t: Tensor, other: Tensor, uniform: Tensor, settings: IntervalConfig) -> Jumps:
    """The jumps that two times (B,) of the time law and the numbers uniform (B, 4) in [0, 1) make.

    The columns of `uniform` decide whether s = t or the jump is aligned, its direction, its place among the aligned
    steps, and the guidance scale.
    """
    mix, way, place, scale = uniform.unbind(1)
    first, last = torch.minimum(t, other), torch.maximum(t, other)
    is_diagonal = mix < settings.diagonal
    is_aligned = ~is_diagonal & (mix < settings.diagonal + (1 - settings.diagonal) * settings.aligned)
    # One number for both: its whole part is the logarithm of the number of steps, the rest the place among them.
    place = place * (MAX_DOUBLINGS + 1)
    num_steps = 2 ** place.floor()
    step = ((place - place.floor()) * num_steps).floor()
    first = torch.where(is_aligned, step / num_steps, first)
    last = torch.where(is_aligned, (step + 1) / num_steps, last)
    back = way < settings.both_ways
    start, end = torch.where(back, last, first), torch.where(back, first, last)
    low, high = settings.guidance
    return Jumps(
        torch.where(is_diagonal, t, start), torch.where(is_diagonal, t, end), low * (high / low) ** scale, is_diagonal
    )


@dataclass(frozen=True)
class AverageOf:
    """u(z, t, s) of a model for the samples of a batch, in float32.

    unconditional (B,) bool, scale (B,), condition: encoded.
    """

    model: CrossFlow
    unconditional: Tensor
    scale: Tensor
    condition: Condition | None = None

    def __call__(self, z: Tensor, t: Tensor, s: Tensor) -> list[Tensor]:
        jump = Jump(s, self.scale)
        averages = self.model.velocities(z, t, self.unconditional, self.condition, jump)
        return [average.float() for average in averages]

    def __getitem__(self, rows: Tensor) -> "AverageOf":
        """That of some samples."""
        condition = None if self.condition is None else self.condition[rows]
        return AverageOf(self.model, self.unconditional[rows], self.scale[rows], condition)

    def without_source(self) -> "AverageOf":
        """That of the same samples without their source."""
        nothing, plain = torch.ones_like(self.unconditional), torch.ones_like(self.scale)
        return replace(self, unconditional=nothing, scale=plain)


def rows_where(flags: Tensor) -> Tensor:
    """The indices at which flags (B,) are set, int64; that of the first sample where none is.

    So that a network always has something to compute, as sharded networks must on every process. Shapes that are only
    rehearsed have no values: there all rows count.
    """
    if detect_fake_mode() is not None:
        return torch.arange(len(flags), device=flags.device)
    rows = flags.nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(1)


def guided_rows(jumps: Jumps, unconditional: Tensor, interval: tuple[float, float]) -> Tensor:
    """(B,) bool: the samples on which built-in guidance acts."""
    inside = (jumps.t >= interval[0]) & (jumps.t <= interval[1])
    return inside & (jumps.scale != 1) & ~unconditional


def guided(velocity: Tensor, without: Callable[[Tensor], Tensor], scale: Tensor, flags: Tensor) -> Tensor:
    """v_without + scale (v - v_without) for the samples at `flags` (B,) bool, elsewhere v.

    velocity (B, *latent); without: rows -> the unconditional velocity of these rows.
    """
    rows = rows_where(flags)
    v, v_without = velocity[rows], without(rows)
    factor = torch.where(flags, scale, torch.ones_like(scale))[rows]
    return velocity.index_copy(0, rows, v_without + expand(factor, v) * (v - v_without))


def derivative(
    average: Average, z: Tensor, velocity: Tensor, t: Tensor, s: Tensor, settings: IntervalConfig
) -> list[Tensor]:
    """du/dt = (d_z u) v + d_t u along the flow with s fixed, for each stage of `average`.

    z, velocity (B, *latent); t, s (B,). In float32 even under autocast. A central difference has both its points
    inside [0, 1].
    """
    with torch.autocast(z.device.type, enabled=False):
        if settings.derivative == "jvp":
            # Forward mode is implemented neither for the fused kernels of attention nor for compiled blocks.
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                tangents = (velocity, torch.ones_like(t), torch.zeros_like(s))
                derivatives: list[Tensor] = torch.func.jvp(average, (z, t, s), tangents)[1]
                return derivatives
        later, earlier = (t + settings.epsilon).clamp(max=1.0), (t - settings.epsilon).clamp(min=0.0)
        after = average(z + expand(later - t, z) * velocity, later, s)
        before = average(z - expand(t - earlier, z) * velocity, earlier, s)
        return [(a - b) / expand(later - earlier, a) for a, b in zip(after, before, strict=True)]


def composed(average: Average, z: Tensor, t: Tensor, s: Tensor, alpha: float, velocity: Tensor | None = None) -> Tensor:
    """alpha u(z, t, m) + (1 - alpha) u(z_m, m, s), m = t + alpha (s - t): what u(z, t, s) is to be, (B, *latent).

    velocity: takes the place of u(z, t, m).
    """
    m = t + alpha * (s - t)
    first = average(z, t, m)[-1] if velocity is None else velocity
    second = average(z + expand(m - t, z) * first, m, s)[-1]
    return alpha * first + (1 - alpha) * second


@dataclass(frozen=True)
class Target:
    """What a network's average velocities, minus `corrections`, are to equal.

    Attributes:
        goal: (B, *latent).
        corrections: (s - t) du/dt for each stage, coarse to fine; none without derivatives.
    """

    goal: Tensor
    corrections: tuple[Tensor, ...] = ()

    def corrected(self, averages: list[Tensor]) -> list[Tensor]:
        """The averages minus the corrections."""
        if not self.corrections:
            return averages
        return [average - correction for average, correction in zip(averages, self.corrections, strict=True)]


def target_of(average: AverageOf, z: Tensor, goal: Tensor, jumps: Jumps, settings: IntervalConfig) -> Target:
    """The target of the jumps from z (B, *latent).

    goal: (B, *latent), the velocity that is learned where s = t, with its gradient to the source.
    """
    rows = rows_where(~jumps.is_diagonal)
    t, s, part = jumps.t[rows], jumps.s[rows], average[rows]
    gap, z, velocity = expand(s - t, z), z.detach()[rows], goal.detach()[rows]
    with torch.no_grad(), without_dropout(average.model.backbone):
        if settings.target == "derivative":
            # Along the network's own flow, unless a teacher's is known: a velocity of the data is not that of the flow.
            tangent = velocity if settings.teacher is not None else part(z, t, t)[-1]
            slopes = derivative(part, z, tangent, t, s, settings)
            blanks = [slope.new_zeros(len(goal), *slope.shape[1:]) for slope in slopes]
            return Target(
                goal, tuple(b.index_copy(0, rows, gap * slope) for b, slope in zip(blanks, slopes, strict=True))
            )
        straight = velocity if settings.first == "velocity" else None
        jump = composed(part, z, t, s, settings.alpha, straight).to(goal.dtype)
        everywhere = torch.zeros_like(goal).index_copy(0, rows, jump)
    return Target(torch.where(expand(jumps.is_diagonal, goal), goal, everywhere))


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Context in which a network drops nothing, so that two evaluations differ by their inputs alone."""
    active = [m for m in network.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


def weighted(loss: Tensor, power: float) -> Tensor:
    """loss / sg(loss + FLOOR) ** power: (B,) -> (B,)."""
    return loss if power == 0 else loss / (loss.detach() + FLOOR) ** power
