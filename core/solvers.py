"""ODE solvers dz/dt = velocity(z, t) on named time grids, from t = 0 to 1 or backwards; they count evaluations.

A solver sees only `velocity(z, t)`; guidance and conditions are inside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.guidance import Velocity
from crossflow.core.registry import Registry

END = 1 - 1e-5
"""Where the released samplers stop: the linear path's derivative is taken short of t = 1."""


@dataclass
class Solution:
    """z (B, *latent) at the end, the number of velocity evaluations, and the trajectory if kept.

    The trajectory has num_steps + 1 states, from the start to z; of dopri5, at evenly spaced times.
    """

    z: Tensor
    num_evaluations: int
    trajectory: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class TimeGrid:
    """Step i is evaluated at `times[i]` and advances by `steps[i]`."""

    times: tuple[float, ...]
    steps: tuple[float, ...]


def uniform_grid(num_steps: int) -> TimeGrid:
    """Evaluate at i/N, advance 1/N."""
    return TimeGrid(tuple(i / num_steps for i in range(num_steps)), (1 / num_steps,) * num_steps)


def released_grid(num_steps: int) -> TimeGrid:
    """The released Euler: N times spaced evenly from 0 to 1 - 1e-5 inclusive, each step advancing (1 - 1e-5)/N."""
    spacing = END / max(num_steps - 1, 1)
    return TimeGrid(tuple(i * spacing for i in range(num_steps)), (END / num_steps,) * num_steps)


TIME_GRIDS: dict[str, Callable[[int], TimeGrid]] = {"uniform": uniform_grid, "released": released_grid}

Step = Callable[[Velocity, Tensor, float, float, "Memory"], Tensor]
SOLVERS: Registry[Step | None] = Registry("solver")


@dataclass
class Memory:
    """What a multi-step solver remembers: the previous velocity and step."""

    velocity: Tensor | None = None
    step: float = 0.0


def _at(velocity: Velocity, z: Tensor, t: float) -> Tensor:
    return velocity(z, torch.tensor(min(max(t, 0.0), 1.0), device=z.device, dtype=torch.float32))


@SOLVERS.register("euler")
def euler_step(velocity: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h v(z, t); order 1, one evaluation."""
    return z + h * _at(velocity, z, t)


@SOLVERS.register("midpoint")
def midpoint_step(velocity: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h v(z + h/2 v(z, t), t + h/2); order 2, two evaluations."""
    return z + h * _at(velocity, z + h / 2 * _at(velocity, z, t), t + h / 2)


@SOLVERS.register("heun")
def heun_step(velocity: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h/2 (v(z, t) + v(z + h v(z, t), t + h)); order 2, two evaluations."""
    v = _at(velocity, z, t)
    return z + h / 2 * (v + _at(velocity, z + h * v, t + h))


@SOLVERS.register("rk4")
def rk4_step(velocity: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """The classical Runge-Kutta step; order 4, four evaluations."""
    k1 = _at(velocity, z, t)
    k2 = _at(velocity, z + h / 2 * k1, t + h / 2)
    k3 = _at(velocity, z + h / 2 * k2, t + h / 2)
    k4 = _at(velocity, z + h * k3, t + h)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@SOLVERS.register("ab2")
def ab2_step(velocity: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """Adams-Bashforth: z + h (v + r/2 (v - v_previous)), r = h / previous h; order 2, one evaluation.

    The first step is a midpoint step.
    """
    v = _at(velocity, z, t)
    previous, ratio = memory.velocity, h / memory.step if memory.step else 0.0
    memory.velocity, memory.step = v, h
    if previous is None:
        return z + h * _at(velocity, z + h / 2 * v, t + h / 2)
    return z + h * (v + ratio / 2 * (v - previous))


SOLVERS.register("dopri5")(None)  # adaptive, by torchdiffeq, see `solve`


def solve(
    velocity: Velocity,
    z: Tensor,
    *,
    solver: str = "euler",
    num_steps: int = 50,
    time_grid: str = "uniform",
    reverse: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    keep_trajectory: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Solution:
    """Integrates dz/dt = velocity(z, t) from t = 0 to 1, or from 1 to 0 with `reverse`.

    z (B, *latent); num_steps >= 1 steps of the fixed-step solvers; `dopri5` is adaptive with rtol, atol and goes from 0
    to 1 - 1e-5; time_grid "uniform", or "released" (forward Euler only). on_step(done, total) after each step of the
    fixed-step solvers.
    Raises UserError for unknown names and impossible combinations.
    """
    step = SOLVERS.get(solver)
    if time_grid not in TIME_GRIDS:
        raise unknown_name("time grid", time_grid, TIME_GRIDS)
    if num_steps < 1:
        raise UserError(f"{num_steps} solver steps came; at least 1 is needed.")
    if time_grid == "released" and (solver != "euler" or reverse):
        raise UserError(
            f"The time grid 'released' belongs to euler from t = 0 to 1, not to {'backwards ' * reverse}{solver}; "
            "use 'uniform'."
        )
    evaluations = 0

    def counted(state: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity(state, t)

    if step is None:
        states = _dopri5(counted, z, num_steps if keep_trajectory else 1, reverse, rtol, atol)
        return Solution(states[-1], evaluations, states if keep_trajectory else [])
    grid = TIME_GRIDS[time_grid](num_steps)
    trajectory, memory = [z] if keep_trajectory else [], Memory()
    for i, (t, h) in enumerate(zip(grid.times, grid.steps, strict=True)):
        z = step(counted, z, 1 - t, -h, memory) if reverse else step(counted, z, t, h, memory)
        if keep_trajectory:
            trajectory.append(z)
        if on_step is not None:
            on_step(i + 1, num_steps)
    return Solution(z, evaluations, trajectory)


def _dopri5(velocity: Velocity, z: Tensor, num_parts: int, reverse: bool, rtol: float, atol: float) -> list[Tensor]:
    """The states at num_parts + 1 evenly spaced times, both ends included."""
    from torchdiffeq import odeint

    start, end = (END, 0.0) if reverse else (0.0, END)
    times = torch.linspace(start, end, num_parts + 1, device=z.device)
    # Left alone the solver steps past the end and interpolates back, with velocities at times the model never saw.
    options = {"step_t": times[-1:]}
    states = odeint(
        lambda t, state: velocity(state, t), z, times, rtol=rtol, atol=atol, method="dopri5", options=options
    )
    return list(states)


def order_of_convergence(coarse_error: float, fine_error: float, refinement: float = 2.0) -> float:
    """log(coarse / fine) / log(refinement): the order seen when steps are `refinement` times smaller."""
    return math.log(coarse_error / fine_error) / math.log(refinement)
