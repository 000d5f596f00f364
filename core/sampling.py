"""Sampling from a trained model, and arithmetic on latents: generate, invert, interpolate, arithmetic.

B batch; latents (C, H, W) or (N, C).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crossflow.core.batch import Condition
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.guidance import Guidance
from crossflow.core.model import CrossFlow
from crossflow.core.progress import Progress
from crossflow.core.solvers import SOLVERS, Solution, Solver, solve


@torch.no_grad()
def generate(
    model: CrossFlow,
    z0: Tensor,
    *,
    condition: Condition | None = None,
    solver: str = "euler",
    steps: int = 50,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    zero_init: int = 0,
    time_grid: str = "uniform",
    weak: CrossFlow | None = None,
    on_step: Progress | None = None,
) -> Tensor:
    """Flows z0 (B, *latent) from t = 0 to 1: z1 (B, *latent).

    condition: of a noise-source baseline. guidance, guidance_interval: scale and times of `Guidance`; with `weak`, an
    under-trained version of the model, by autoguidance. zero_init: number of first steps with zero velocity. solver,
    steps, time_grid, on_step: as for `solve`.
    """
    guided = Guidance(guidance, guidance_interval, zero_init / max(steps, 1))
    return flow(
        model, z0, guided, condition=condition, weak=weak, solver=solver, steps=steps, time_grid=time_grid,
        on_step=on_step,
    ).z  # fmt: skip


@torch.no_grad()
def invert(
    model: CrossFlow,
    z1: Tensor,
    *,
    condition: Condition | None = None,
    solver: str = "euler",
    steps: int = 50,
    guidance: float = 1.0,
    on_step: Progress | None = None,
) -> Tensor:
    """Flows z1 (B, *latent) back from t = 1 to 0: z0. To re-generate z1 use a second-order solver or many steps."""
    guided = Guidance(guidance)
    return flow(
        model, z1, guided, condition=condition, solver=solver, steps=steps, reverse=True, on_step=on_step
    ).z  # fmt: skip


@torch.no_grad()
def flow(
    model: CrossFlow,
    z: Tensor,
    guidance: Guidance,
    *,
    condition: Condition | None = None,
    weak: CrossFlow | None = None,
    solver: str = "euler",
    steps: int = 50,
    time_grid: str = "uniform",
    reverse: bool = False,
    keep_trajectory: bool = False,
    on_step: Progress | None = None,
) -> Solution:
    """Integrates the guided velocity from z (B, *latent); the solution counts the network evaluations of each item.

    An adaptive solver integrates items one at a time, so the steps and the result of an item depend on no other.
    keep_trajectory: as for `solve`.
    """
    scheme = SOLVERS.get(solver)
    alone = scheme.adaptive and len(z) > 1
    solutions = []
    for rows in [slice(i, i + 1) for i in range(len(z))] if alone else [slice(None)]:
        part = None if condition is None else condition[rows]
        velocity = guidance.jumps(model, part) if scheme.jumps else guidance.velocity(model, part, weak)
        solutions.append(
            solve(
                velocity, z[rows], solver=solver, steps=steps, time_grid=time_grid, reverse=reverse,
                evaluations_at=_evaluations(scheme, guidance), keep_trajectory=keep_trajectory, on_step=on_step,
            )
        )  # fmt: skip
    return Solution(
        torch.cat([each.z for each in solutions]),
        sum((each.evaluations for each in solutions), ()),
        [torch.cat(states) for states in zip(*(each.trajectory for each in solutions), strict=True)],
    )


def _evaluations(solver: Solver, guidance: Guidance) -> Callable[[float], int]:
    """Network evaluations in a call of the velocity at a time: one where the guidance is built in."""
    return (lambda t: 1) if solver.jumps else guidance.evaluations


def count_evaluations(
    *,
    solver: str,
    steps: int,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    zero_init: int = 0,
    time_grid: str = "uniform",
) -> int | None:
    """Network evaluations that `generate` spends on each item under these settings; None for an adaptive solver.

    A guided velocity counts as two evaluations, whether guided by the indicator (conditional and unconditional) or by a
    weaker model; a jump of a flow map as one. They are counted by running the solver on a velocity of zero.

    >>> count_evaluations(solver="euler", steps=20, guidance=4.0)
    40
    >>> count_evaluations(solver="ab2", steps=50, guidance=6.0, guidance_interval=(0.0, 0.5))
    78
    """
    scheme = SOLVERS.get(solver)
    if scheme.adaptive:
        return None
    guided = Guidance(guidance, guidance_interval, zero_init / max(steps, 1))
    (count,) = solve(
        lambda z, *times: torch.zeros_like(z), torch.zeros(1), solver=solver, steps=steps, time_grid=time_grid,
        evaluations_at=_evaluations(scheme, guided),
    ).evaluations  # fmt: skip
    return count


def frame_weights(num_frames: int) -> list[float]:
    """`num_frames` >= 2 weights spaced evenly from 0 to 1."""
    if num_frames < 2:
        raise UserError(f"Expected at least 2 frames, got {num_frames}.")
    return [index / (num_frames - 1) for index in range(num_frames)]


def between(a: Tensor, b: Tensor, weight: float, kind: str = "lerp") -> Tensor:
    """The latent at `weight` in [0, 1] of the way from a to b, all of the same shape.

    lerp: (1 - weight) a + weight b. slerp: along the great circle of the flattened latents, their norms interpolated
    linearly (Shoemake 1985).
    """
    if kind == "lerp":
        return (1 - weight) * a + weight * b
    if kind != "slerp":
        raise unknown_name("interpolation", kind, ("lerp", "slerp"))
    norm_a, norm_b = a.norm(), b.norm()
    if norm_a == 0 or norm_b == 0:
        raise UserError("slerp needs two non-zero latents; use lerp.")
    unit_a, unit_b = a / norm_a, b / norm_b
    angle = torch.acos((unit_a * unit_b).sum().clamp(-1, 1))
    if angle.sin().abs() < 1e-4:  # (nearly) parallel: the great circle is the straight line, or is not unique
        return (1 - weight) * a + weight * b
    direction = (((1 - weight) * angle).sin() * unit_a + (weight * angle).sin() * unit_b) / angle.sin()
    return direction * ((1 - weight) * norm_a + weight * norm_b)


def arithmetic(
    base: Tensor,
    plus: Tensor | None = None,
    minus: Tensor | None = None,
    strength: float = 1.0,
    restandardise: bool = False,
) -> Tensor:
    """base + strength (plus - minus), each (B, *latent); None counts as zero (CrossFlow section 4.5).

    restandardise: `standardised`, as in the released demo.
    """
    result = base
    if plus is not None:
        result = result + strength * plus
    if minus is not None:
        result = result - strength * minus
    return standardised(result) if restandardise else result


def standardised(z: Tensor) -> Tensor:
    """(z - mean) / standard deviation, both over the whole latent of a sample; z (B, *latent).

    Raises UserError for a sample of standard deviation 0.
    """
    flat = z.flatten(1)
    deviation = flat.std(1, keepdim=True)
    if (deviation == 0).any():
        raise UserError(
            "The result of the arithmetic has the same value everywhere and cannot be scaled to standard deviation 1: "
            "the inputs cancel each other. Choose another strength, or do not restandardise."
        )
    return ((flat - flat.mean(1, keepdim=True)) / deviation).reshape(z.shape)
