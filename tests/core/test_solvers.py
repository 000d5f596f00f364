"""Solvers on problems with known answers: order, accuracy, evaluation counts, both directions, time grids."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.solvers import END, SOLVERS, order_of_convergence, released_grid, solve, uniform_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}
Z0 = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64)


def linear(z: Tensor, t: Tensor) -> Tensor:
    """dz/dt = 2 t z + t, in float64 (the time comes as float32)."""
    t = t.double()
    return 2 * t * z + t


def exact(z0: Tensor, t: float = 1.0) -> Tensor:
    """(z0 + 1/2) e^(t^2) - 1/2."""
    return (z0 + 0.5) * math.exp(t**2) - 0.5


def error(solver: str, num_steps: int) -> float:
    return float((solve(linear, Z0, solver=solver, num_steps=num_steps).z - exact(Z0)).abs().max())


@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_error_falls_with_the_order_of_the_solver(solver: str, order: int) -> None:
    # powers of two: their times are exact in float32
    steps = (8, 16) if order == 4 else (64, 128)
    assert order_of_convergence(error(solver, steps[0]), error(solver, steps[1])) == pytest.approx(order, abs=0.15)


def test_every_fixed_step_solver_has_its_order_tested() -> None:
    assert set(SOLVERS.names()) == {*ORDERS, "dopri5"}


def test_dopri5_keeps_its_tolerance() -> None:
    loose = solve(linear, Z0, solver="dopri5", rtol=1e-3, atol=1e-3)
    tight = solve(linear, Z0, solver="dopri5", rtol=1e-9, atol=1e-9)
    assert (tight.z - exact(Z0, END)).abs().max() < 1e-6  # times are float32
    assert (loose.z - exact(Z0, END)).abs().max() < 1e-2
    assert loose.num_evaluations < tight.num_evaluations


@pytest.mark.parametrize(
    ("solver", "evaluations"), [("euler", 10), ("midpoint", 20), ("heun", 20), ("rk4", 40), ("ab2", 11)]
)
def test_evaluations_are_counted(solver: str, evaluations: int) -> None:
    calls = []
    solution = solve(lambda z, t: calls.append(t) or linear(z, t), Z0, solver=solver, num_steps=10)
    assert solution.num_evaluations == len(calls) == evaluations


def test_dopri5_counts_its_evaluations() -> None:
    calls = []
    assert solve(lambda z, t: calls.append(t) or linear(z, t), Z0, solver="dopri5").num_evaluations == len(calls) > 6


@pytest.mark.parametrize("solver", SOLVERS.names())
@pytest.mark.parametrize("reverse", [False, True])
def test_the_velocity_is_asked_at_times_from_0_to_1_only(solver: str, reverse: bool) -> None:
    times = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        assert t.ndim == 0
        times.append(float(t))
        return linear(z, t)

    solve(velocity, Z0, solver=solver, num_steps=7, reverse=reverse)
    assert min(times) >= 0
    assert max(times) <= 1


@pytest.mark.parametrize("solver", SOLVERS.names())
def test_forward_then_reverse_returns_the_start(solver: str) -> None:
    there = solve(linear, Z0, solver=solver, num_steps=200).z
    back = solve(linear, there, solver=solver, num_steps=200, reverse=True).z
    tolerance = {"euler": 5e-2, "rk4": 1e-7}.get(solver, 1e-4)
    assert (back - Z0).abs().max() < tolerance
    assert (there - Z0).abs().max() > 0.1


@pytest.mark.parametrize("reverse", [False, True])
def test_every_solver_is_exact_on_a_constant_velocity(reverse: bool) -> None:
    for solver in SOLVERS.names():
        end = solve(lambda z, t: torch.full_like(z, 2.0), Z0, solver=solver, num_steps=3, reverse=reverse).z
        length = END if solver == "dopri5" else 1.0
        assert torch.allclose(end, Z0 + (-2.0 if reverse else 2.0) * length, atol=1e-6), solver


def test_uniform_grid_evaluates_at_i_over_n() -> None:
    grid = uniform_grid(4)
    assert grid.times == (0, 0.25, 0.5, 0.75)
    assert grid.steps == (0.25,) * 4


def test_released_grid_evaluates_up_to_its_end_and_advances_less_than_its_spacing() -> None:
    grid = released_grid(5)
    assert grid.times == pytest.approx((0, END / 4, END / 2, 3 * END / 4, END))
    assert grid.steps == pytest.approx((END / 5,) * 5)
    assert released_grid(1).times == (0,)


def test_euler_on_the_released_grid_by_hand() -> None:
    times: list[float] = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return t.double() * torch.ones_like(z)

    end = solve(velocity, torch.zeros(1, 1, dtype=torch.float64), num_steps=3, time_grid="released").z
    assert times == pytest.approx([0, END / 2, END], abs=1e-7)
    assert end.item() == pytest.approx((0 + 0.5 + 1) * END * END / 3, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS.names())
@pytest.mark.parametrize("reverse", [False, True])
def test_trajectory_runs_from_start_to_end_along_the_solution(solver: str, reverse: bool) -> None:
    solution = solve(linear, Z0, solver=solver, num_steps=50, reverse=reverse, keep_trajectory=True)
    assert len(solution.trajectory) == 51
    assert torch.equal(solution.trajectory[0], Z0)
    assert torch.equal(solution.trajectory[-1], solution.z)
    assert solve(linear, Z0, solver=solver, num_steps=50).trajectory == []
    if not reverse:
        tolerance = 0.1 if solver == "euler" else 1e-3
        assert (solution.trajectory[25] - exact(Z0, 0.5)).abs().max() < tolerance


def test_progress_is_told_after_each_step_and_the_start_is_not_modified() -> None:
    told: list[tuple[int, int]] = []
    z = Z0.clone()
    solve(linear, z, num_steps=3, on_step=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(z, Z0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "eular"}, r"Unknown solver 'eular'\. Did you mean 'euler'\? Known: ab2, dopri5"),
        ({"time_grid": "unifrom"}, r"Unknown time grid 'unifrom'\. Did you mean 'uniform'"),
        ({"num_steps": 0}, "0 solver steps came; at least 1"),
        ({"solver": "heun", "time_grid": "released"}, "belongs to euler .* not to heun"),
        ({"reverse": True, "time_grid": "released"}, "belongs to euler .* not to backwards euler"),
    ],
)
def test_impossible_requests_say_what_is_possible(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(linear, Z0, **arguments)


def test_batch_does_not_matter_to_fixed_step_solvers() -> None:
    run: Callable[[Tensor], Tensor] = lambda z: solve(linear, z, solver="rk4", num_steps=5).z  # noqa: E731
    assert torch.equal(run(Z0)[1:], run(Z0[1:]))
