"""ODE solvers of dz/dt = velocity(z, t) from t = 0 to 1 or backwards, and the time grids of the fixed-step ones.

A solver sees only `velocity(z, t)`; guidance and conditions are part of the velocity. `SOLVERS` is the table of
solvers with their properties. B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.progress import Progress
from crossflow.core.registry import Registry

Velocity = Callable[..., Tensor]
"""(z (B, *latent), t in [0, 1]) -> dz/dt (B, *latent); of a flow map (z, t, s) -> the average velocity from t to s. The
times are Python numbers, so that nobody reads them from a device.
"""

END = 1 - 1e-5
"""Time at which the released samplers stop, just before t = 1."""


@dataclass(frozen=True)
class Solution:
    """The result of an integration.

    Attributes:
        z: (B, *latent) at the end.
        evaluations: network evaluations spent on each of the B items.
        trajectory: steps + 1 states (B, *latent) from the start to z (of dopri5 at evenly spaced times); empty unless
            requested.
    """

    z: Tensor
    evaluations: tuple[int, ...]
    trajectory: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class TimeGrid:
    """Step i evaluates the velocity at `times[i]` and advances by `lengths[i]`."""

    times: tuple[float, ...]
    lengths: tuple[float, ...]


def uniform_grid(steps: int) -> TimeGrid:
    """Evaluate at i/N, advance 1/N."""
    return TimeGrid(tuple(i / steps for i in range(steps)), (1 / steps,) * steps)


def released_grid(steps: int) -> TimeGrid:
    """The released Euler: N times spaced evenly from 0 to 1 - 1e-5 inclusive, each step advancing (1 - 1e-5)/N."""
    spacing = END / max(steps - 1, 1)
    return TimeGrid(tuple(i * spacing for i in range(steps)), (END / steps,) * steps)


TIME_GRIDS: dict[str, Callable[[int], TimeGrid]] = {"uniform": uniform_grid, "released": released_grid}


@dataclass
class Memory:
    """State of a multi-step solver: the velocity and length of the previous step."""

    velocity: Tensor | None = None
    length: float = 0.0


Step = Callable[[Velocity, Tensor, float, float, Memory], Tensor]
"""(slope, z (B, *latent), t, step length h, memory) -> z at t + h."""


def euler_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h v(z, t)."""
    return z + h * slope(z, t)


def midpoint_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h v(z + h/2 v(z, t), t + h/2)."""
    return z + h * slope(z + h / 2 * slope(z, t), t + h / 2)


def heun_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h/2 (v(z, t) + v(z + h v(z, t), t + h))."""
    v = slope(z, t)
    return z + h / 2 * (v + slope(z + h * v, t + h))


def rk4_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h/6 (k1 + 2 k2 + 2 k3 + k4)."""
    k1 = slope(z, t)
    k2 = slope(z + h / 2 * k1, t + h / 2)
    k3 = slope(z + h / 2 * k2, t + h / 2)
    k4 = slope(z + h * k3, t + h)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def ab2_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h (v + r/2 (v - v_previous)), r = h / previous h; the first step is a midpoint step."""
    v = slope(z, t)
    previous, ratio = memory.velocity, h / memory.length if memory.length else 0.0
    memory.velocity, memory.length = v, h
    if previous is None:
        return z + h * slope(z + h / 2 * v, t + h / 2)
    return z + h * (v + ratio / 2 * (v - previous))


def map_step(slope: Velocity, z: Tensor, t: float, h: float, memory: Memory) -> Tensor:
    """z + h u(z, t, t + h)."""
    return z + h * slope(z, t, t + h)


@dataclass(frozen=True)
class Solver:
    """A solver and its properties.

    Attributes:
        name: as written by users.
        about: description in lists of solvers.
        order: the global error falls as (step length) ** order.
        evaluations: velocity evaluations in each step; of an adaptive solver, in each attempted step.
        first_evaluations: further velocity evaluations at the start.
        step: None for an adaptive solver, which chooses its own steps.
        jumps: whether it takes the average velocities of a flow map, whose error does not depend on the steps' length.
    """

    name: str
    about: str
    order: int
    evaluations: int
    first_evaluations: int = 0
    step: Step | None = None
    jumps: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps by its error estimate, for each item of a batch separately."""
        return self.step is None

    @property
    def summary(self) -> str:
        """Description, order and cost in one line."""
        plural = "s" * (self.evaluations > 1)
        if self.jumps:
            return f"{self.about}; {self.evaluations} evaluation{plural} per step"
        return f"{self.about}; order {self.order}, {self.evaluations} evaluation{plural} per step"


SOLVERS: Registry[Solver] = Registry("solver")
for _solver in (
    Solver("euler", "Euler", 1, 1, step=euler_step),
    Solver("midpoint", "Midpoint rule", 2, 2, step=midpoint_step),
    Solver("heun", "Heun", 2, 2, step=heun_step),
    Solver("rk4", "Classical Runge-Kutta", 4, 4, step=rk4_step),
    Solver("ab2", "Adams-Bashforth, its first step by the midpoint rule", 2, 1, 1, step=ab2_step),
    Solver("map", "Jumps of a flow map, as crossflow distill trains it", 1, 1, step=map_step, jumps=True),
    Solver("dopri5", f"Dormand-Prince with adaptive steps (rtol = atol = 1e-5), from 0 to {END}", 5, 6, 2),
):
    SOLVERS.register(_solver.name)(_solver)


def solve(
    velocity: Velocity,
    z: Tensor,
    *,
    solver: str = "euler",
    steps: int = 50,
    time_grid: str = "uniform",
    reverse: bool = False,
    tolerance: float = 1e-5,
    evaluations_at: Callable[[float], int] = lambda t: 1,
    keep_trajectory: bool = False,
    on_step: Progress | None = None,
) -> Solution:
    """Integrates dz/dt = velocity(z, t) from t = 0 to 1, or from 1 to 0 with `reverse`.

    >>> solve(lambda z, t: 2 * t * torch.ones_like(z), torch.zeros(1, 2), solver="midpoint", steps=4)
    Solution(z=tensor([[1., 1.]]), evaluations=(8,), trajectory=[])

    Args:
        velocity: (z (B, *latent), t float) -> (B, *latent); for "map" (z, t, s) -> (B, *latent).
        z: (B, *latent) at the start. B = 1 for an adaptive solver: an error norm over several items would make the
            result of an item depend on its neighbours.
        solver: a name in `SOLVERS`.
        steps: of a fixed-step solver, at least 1.
        time_grid: "uniform", or "released" (euler forwards only).
        reverse: start at t = 1 and end at 0; dopri5 starts at 1 - 1e-5.
        tolerance: rtol and atol of an adaptive solver.
        evaluations_at: network evaluations in a call of `velocity` at a time; guidance spends two, for example.
        keep_trajectory: also return the intermediate states.
        on_step: called with (steps done, steps) after each step of a fixed-step solver.

    Raises:
        UserError: for an unknown name, steps < 1, or a time grid that does not fit the solver.
    """
    scheme = _checked(solver, steps, time_grid, reverse)
    evaluations = 0

    def slope(state: Tensor, *times: float) -> Tensor:
        nonlocal evaluations
        times = tuple(min(max(t, 0.0), 1.0) for t in times)
        evaluations += evaluations_at(times[0])
        return velocity(state, *times)

    if scheme.step is None:
        assert len(z) == 1, f"{solver} integrates one item at a time, got {len(z)}"
        states = _dopri5(slope, z, steps if keep_trajectory else 1, reverse, tolerance)
        return Solution(states[-1], (evaluations,), states if keep_trajectory else [])
    grid = TIME_GRIDS[time_grid](steps)
    trajectory, memory = [z] if keep_trajectory else [], Memory()
    for i, (t, h) in enumerate(zip(grid.times, grid.lengths, strict=True)):
        z = scheme.step(slope, z, 1 - t, -h, memory) if reverse else scheme.step(slope, z, t, h, memory)
        if keep_trajectory:
            trajectory.append(z)
        if on_step is not None:
            on_step(i + 1, steps)
    return Solution(z, (evaluations,) * len(z), trajectory)


def _checked(solver: str, steps: int, time_grid: str, reverse: bool) -> Solver:
    """The solver called `solver`; raises UserError for invalid settings."""
    scheme = SOLVERS.get(solver)
    if time_grid not in TIME_GRIDS:
        raise unknown_name("time grid", time_grid, TIME_GRIDS)
    if steps < 1:
        raise UserError(f"Expected at least 1 solver step, got {steps}.")
    if time_grid == "released" and (solver != "euler" or reverse):
        raise UserError(
            f"The time grid 'released' is for euler from t = 0 to 1, not for {'backwards ' * reverse}{solver}; "
            "use 'uniform'."
        )
    return scheme


def _dopri5(slope: Velocity, z: Tensor, num_parts: int, reverse: bool, tolerance: float) -> list[Tensor]:
    """The states at num_parts + 1 evenly spaced times, both ends included."""
    from torchdiffeq import odeint

    start, end = (END, 0.0) if reverse else (0.0, END)
    times = torch.linspace(start, end, num_parts + 1, device=z.device)
    # By default the solver steps past the end and interpolates, with velocities at times outside the training range.
    options = {"step_t": times[-1:]}
    states = odeint(
        lambda t, state: slope(state, float(t)),
        z,
        times,
        rtol=tolerance,
        atol=tolerance,
        method="dopri5",
        options=options,
    )
    return list(states)
