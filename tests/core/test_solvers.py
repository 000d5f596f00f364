"""Solvers on problems with known answers: order, accuracy, evaluation counts, both directions, time grids."""

import math

import pytest
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.solvers import END, SOLVERS, released_grid, solve, uniform_grid

ALL = [name for name in SOLVERS.names() if not SOLVERS.get(name).jumps]
FIXED = [name for name in ALL if not SOLVERS.get(name).adaptive]
Z0 = torch.tensor([[0.5, -1.0, 2.0, 0.1]], dtype=torch.float64)


def linear(z: Tensor, t: float) -> Tensor:
    """dz/dt = 2 t z + t."""
    return 2 * t * z + t


def exact(z0: Tensor, t: float = 1.0) -> Tensor:
    """(z0 + 1/2) e^(t^2) - 1/2."""
    return (z0 + 0.5) * math.exp(t**2) - 0.5


def error(solver: str, steps: int) -> float:
    return float((solve(linear, Z0, solver=solver, steps=steps).z - exact(Z0)).abs().max())


def test_the_table_holds_the_solvers_and_their_names() -> None:
    assert ALL == ["ab2", "dopri5", "euler", "heun", "midpoint", "rk4"]
    assert SOLVERS.names() == sorted([*ALL, "map"])
    assert [SOLVERS.get(name).name for name in ALL] == ALL
    assert [name for name in ALL if SOLVERS.get(name).adaptive] == ["dopri5"]
    assert SOLVERS.get("heun").summary == "Heun; order 2, 2 evaluations per step"
    assert SOLVERS.get("euler").summary.endswith("1 evaluation per step")


@pytest.mark.parametrize("solver", FIXED)
def test_error_falls_with_the_order_of_the_solver(solver: str) -> None:
    order = SOLVERS.get(solver).order
    steps = (8, 16) if order == 4 else (64, 128)
    assert math.log2(error(solver, steps[0]) / error(solver, steps[1])) == pytest.approx(order, abs=0.15)


def test_steps_of_dopri5_grow_as_the_fifth_root_of_its_tolerance() -> None:
    """On a rotation; torchdiffeq keeps its times in float32."""
    coarse, fine = (
        solve(lambda z, t: 20 * z.roll(1) * torch.tensor([1, -1]), Z0[:, :2], solver="dopri5", tolerance=tolerance)
        for tolerance in (1e-5, 1e-9)
    )
    ratio = fine.evaluations[0] / coarse.evaluations[0]
    assert math.log(1e4) / math.log(ratio) == pytest.approx(SOLVERS.get("dopri5").order, abs=0.5)


def test_dopri5_keeps_its_tolerance() -> None:
    loose, tight = (solve(linear, Z0, solver="dopri5", tolerance=tolerance) for tolerance in (1e-3, 1e-9))
    assert (tight.z - exact(Z0, END)).abs().max() < 1e-6  # times are float32
    assert (loose.z - exact(Z0, END)).abs().max() < 1e-2
    assert loose.evaluations < tight.evaluations


def test_dopri5_integrates_one_item_at_a_time() -> None:
    with pytest.raises(AssertionError, match="dopri5 integrates one item at a time, got 2"):
        solve(linear, Z0.expand(2, -1), solver="dopri5")


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("solver", FIXED)
def test_fixed_step_solvers_evaluate_as_often_as_recorded(solver: str, steps: int) -> None:
    record, times = SOLVERS.get(solver), []
    solution = solve(lambda z, t: times.append(t) or linear(z, t), Z0.expand(3, -1), solver=solver, steps=steps)
    assert len(times) == record.first_evaluations + record.evaluations * steps
    assert solution.evaluations == (len(times),) * 3


def test_dopri5_evaluates_as_often_as_recorded_in_each_attempted_step() -> None:
    record, times = SOLVERS.get("dopri5"), []
    solution = solve(lambda z, t: times.append(t) or linear(z, t), Z0, solver="dopri5")
    assert solution.evaluations == (len(times),)
    attempts, remainder = divmod(len(times) - record.first_evaluations, record.evaluations)
    assert attempts > 1
    assert remainder == 0


@pytest.mark.parametrize("solver", ALL)
def test_network_evaluations_are_those_at_the_times_of_the_calls(solver: str) -> None:
    times: list[float] = []
    solution = solve(
        lambda z, t: times.append(t) or linear(z, t),
        Z0,
        solver=solver,
        steps=8,
        evaluations_at=lambda t: 5 if t < 0.3 else 2,
    )
    assert solution.evaluations == (sum(5 if t < 0.3 else 2 for t in times),)
    assert min(times) < 0.3 < max(times)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("reverse", [False, True])
def test_velocity_is_evaluated_at_times_from_0_to_1_only(solver: str, reverse: bool) -> None:
    times = []

    def velocity(z: Tensor, t: float) -> Tensor:
        assert isinstance(t, float), "reading a time from a tensor would make the host wait for the device"
        times.append(t)
        return linear(z, t)

    solve(velocity, Z0, solver=solver, steps=7, reverse=reverse)
    assert min(times) >= 0
    assert max(times) <= 1


@pytest.mark.parametrize("solver", ALL)
def test_forward_then_reverse_returns_the_start(solver: str) -> None:
    end = solve(linear, Z0, solver=solver, steps=200).z
    start = solve(linear, end, solver=solver, steps=200, reverse=True).z
    tolerance = {"euler": 5e-2, "rk4": 1e-7}.get(solver, 1e-4)
    assert (start - Z0).abs().max() < tolerance
    assert (end - Z0).abs().max() > 0.1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("solver", ALL)
def test_constant_velocity_is_integrated_exactly(solver: str, reverse: bool) -> None:
    end = solve(lambda z, t: torch.full_like(z, 2.0), Z0, solver=solver, steps=3, reverse=reverse).z
    length = END if solver == "dopri5" else 1.0
    assert torch.allclose(end, Z0 + (-2.0 if reverse else 2.0) * length, atol=1e-6)


def test_ab2_scales_its_extrapolation_by_the_ratio_of_step_lengths() -> None:
    """Two steps of lengths 0.2 and 0.1 on dz/dt = t, whose extrapolation is exact: z = t^2 / 2."""
    from crossflow.core.solvers import Memory, ab2_step

    memory = Memory()
    z = ab2_step(lambda z, t: torch.full_like(z, t), torch.zeros(1), 0.0, 0.2, memory)
    z = ab2_step(lambda z, t: torch.full_like(z, t), z, 0.2, 0.1, memory)
    assert z.item() == pytest.approx(0.3**2 / 2, abs=1e-7)


def test_uniform_grid_evaluates_at_i_over_n() -> None:
    grid = uniform_grid(4)
    assert grid.times == (0, 0.25, 0.5, 0.75)
    assert grid.lengths == (0.25,) * 4


def test_released_grid_evaluates_up_to_its_end_and_advances_less_than_its_spacing() -> None:
    grid = released_grid(5)
    assert grid.times == pytest.approx((0, END / 4, END / 2, 3 * END / 4, END))
    assert grid.lengths == pytest.approx((END / 5,) * 5)
    assert released_grid(1).times == (0,)


def test_euler_on_the_released_grid_by_hand() -> None:
    times: list[float] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        times.append(t)
        return t * torch.ones_like(z)

    end = solve(velocity, torch.zeros(1, 1, dtype=torch.float64), steps=3, time_grid="released").z
    assert times == pytest.approx([0, END / 2, END], abs=1e-7)
    assert end.item() == pytest.approx((0 + 0.5 + 1) * END * END / 3, abs=1e-6)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("reverse", [False, True])
def test_trajectory_runs_from_start_to_end_along_the_solution(solver: str, reverse: bool) -> None:
    solution = solve(linear, Z0, solver=solver, steps=50, reverse=reverse, keep_trajectory=True)
    assert len(solution.trajectory) == 51
    assert torch.equal(solution.trajectory[0], Z0)
    assert torch.equal(solution.trajectory[-1], solution.z)
    assert solve(linear, Z0, solver=solver, steps=50).trajectory == []
    if not reverse:
        tolerance = 0.1 if solver == "euler" else 1e-3
        assert (solution.trajectory[25] - exact(Z0, 0.5)).abs().max() < tolerance


def test_progress_is_reported_after_each_step_and_the_start_is_not_modified() -> None:
    progress: list[tuple[int, int]] = []
    z = Z0.clone()
    solve(linear, z, steps=3, on_step=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(z, Z0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "eular"}, r"Unknown solver 'eular'\. Did you mean 'euler'\? Known: ab2, dopri5"),
        ({"time_grid": "unifrom"}, r"Unknown time grid 'unifrom'\. Did you mean 'uniform'"),
        ({"steps": 0}, r"Expected at least 1 solver step, got 0\."),
        ({"solver": "heun", "time_grid": "released"}, "is for euler .* not for heun"),
        ({"reverse": True, "time_grid": "released"}, "is for euler .* not for backwards euler"),
    ],
)
def test_invalid_settings_are_user_errors_that_name_the_valid_ones(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(linear, Z0, **arguments)


@pytest.mark.parametrize("solver", FIXED)
def test_an_item_is_solved_identically_alone_and_in_a_batch(solver: str) -> None:
    z = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64)
    whole, alone = (solve(linear, start, solver=solver, steps=5).z for start in (z, z[1:]))
    assert torch.equal(whole[1:], alone)
