"""Generate, invert, interpolate, arithmetic."""

from collections.abc import Callable

import pytest
import torch

from crossflow.core.batch import Condition
from crossflow.core.errors import UserError
from crossflow.core.guidance import Guidance, plain
from crossflow.core.model import CrossFlow, as_flags
from crossflow.core.sampling import arithmetic, between, count_evaluations, flow, frame_weights, generate, invert
from crossflow.core.solvers import SOLVERS, solve
from crossflow.core.source import SourceEncoder

LATENT = (2, 4, 4)


@pytest.fixture
def make(tiny_dit: Callable) -> Callable[..., CrossFlow]:
    # a slow clock: adaptive steps need not be small, and errors do not add up over hundreds of them
    return lambda seed=0: CrossFlow(
        SourceEncoder(None, "gaussian", LATENT), tiny_dit(LATENT, seed=seed, time_scale=1.0)
    )


@pytest.fixture
def z0() -> torch.Tensor:
    return torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_generate_is_the_euler_loop_written_out(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    model, z = make(), z0
    for i in range(4):
        t = torch.full((3,), i / 4)
        cond, uncond = (model.velocity(z, t, as_flags(flag, z)) for flag in (False, True))
        z = z + (uncond + 2.0 * (cond - uncond)) / 4
    assert torch.allclose(generate(model, z0, steps=4, guidance=2.0), z, atol=1e-5)


def test_generate_keeps_no_graph_and_gives_the_end_of_its_solution(make: Callable, z0: torch.Tensor) -> None:
    model = make()
    z1 = generate(model, z0, steps=3, solver="heun", guidance=2.0)
    solution = flow(model, z0, Guidance(2.0), steps=3, solver="heun")
    assert not z1.requires_grad
    assert torch.equal(z1, solution.z)
    assert solution.evaluations == (12, 12, 12)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"solver": "euler", "steps": 20}, 20),
        ({"solver": "euler", "steps": 20, "guidance": 3.0}, 40),
        ({"solver": "euler", "steps": 20, "guidance": 0.0}, 40),
        ({"solver": "ab2", "steps": 50}, 51),
        # calls at 0, 0.01 (the midpoint of the first step), 0.02, ..., 0.98: 27 until 0.5, 24 after it
        ({"solver": "ab2", "steps": 50, "guidance": 6.0, "guidance_interval": (0.0, 0.5)}, 2 * 27 + 24),
        ({"solver": "heun", "steps": 4, "guidance": 6.0, "guidance_interval": (0.5, 1.0)}, 3 + 2 * 5),
        ({"solver": "euler", "steps": 10, "guidance": 3.0, "zero_init": 2}, 16),
        ({"solver": "euler", "steps": 10, "guidance": 3.0, "time_grid": "released"}, 20),
        ({"solver": "rk4", "steps": 2, "guidance": 1.0, "guidance_interval": (0.0, 0.5)}, 8),
    ],
)
@pytest.mark.parametrize("by", ["indicator", "weak model"])
def test_network_evaluations_are_predicted_as_the_networks_count_them(
    make: Callable[..., CrossFlow], z0: torch.Tensor, settings: dict, count: int, by: str
) -> None:
    model, weak = make(), make(1)
    rows: list[int] = []
    for network in (model, weak):
        network.backbone.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    generate(model, z0, weak=weak if by == "weak model" else None, **settings)
    assert sum(rows) / len(z0) == count_evaluations(**settings) == count


def test_evaluations_of_an_adaptive_solver_are_counted_and_not_predicted(
    make: Callable[..., CrossFlow], z0: torch.Tensor
) -> None:
    model, calls = make(), []
    assert count_evaluations(solver="dopri5", steps=50) is None
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    solution = flow(model, z0, Guidance(), solver="dopri5")
    assert len(solution.evaluations) == len(z0)
    assert sum(solution.evaluations) == len(calls)


@pytest.mark.parametrize("solver", [name for name in SOLVERS.names() if not SOLVERS.get(name).jumps])
def test_an_item_is_generated_identically_alone_and_in_a_batch(
    make: Callable[..., CrossFlow], z0: torch.Tensor, solver: str
) -> None:
    model = make()
    whole = generate(model, z0, solver=solver, steps=5, guidance=3.0)
    assert torch.allclose(generate(model, z0[1:2], solver=solver, steps=5, guidance=3.0)[0], whole[1], atol=1e-5)


def test_adaptive_steps_do_not_depend_on_other_items(tiny_dit: Callable, z0: torch.Tensor) -> None:
    model = CrossFlow(SourceEncoder(None, "gaussian", LATENT), tiny_dit(LATENT, context_dim=6, time_scale=20.0))
    z = torch.cat([z0[:1], 100 * z0[1:2]])
    condition = Condition(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2)))
    both = flow(model, z, Guidance(), condition=condition, solver="dopri5")
    for i in (0, 1):
        alone = flow(model, z[i : i + 1], Guidance(), condition=condition[i : i + 1], solver="dopri5")
        assert torch.equal(both.z[i], alone.z[0])
        assert both.evaluations[i] == alone.evaluations[0]
    assert both.evaluations[0] != both.evaluations[1]


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5"])
def test_invert_returns_to_the_source(make: Callable[..., CrossFlow], z0: torch.Tensor, solver: str) -> None:
    model = make()
    z1 = generate(model, z0, solver=solver, steps=40, guidance=1.5)
    assert (z1 - z0).abs().max() > 0.1
    back = invert(model, z1, solver=solver, steps=40, guidance=1.5)
    assert torch.allclose(back, z0, atol=1e-3)


def test_zeroed_first_steps_leave_the_source_unchanged(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    velocity = Guidance(zero_until=1 / 50).velocity(make())
    with torch.no_grad():
        states = solve(velocity, z0, steps=50, keep_trajectory=True).trajectory
    assert torch.equal(states[1], z0)
    assert not torch.equal(states[2], z0)


def test_zero_steps_are_a_user_error(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    with pytest.raises(UserError, match="at least 1 solver step, got 0"):
        generate(make(), z0, steps=0)


@torch.no_grad()
def test_guidance_interval_applies_to_autoguidance(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    model, weak = make(), make(1)
    velocity = Guidance(3.0, (0.5, 1.0)).velocity(model, weak=weak)
    assert torch.equal(velocity(z0, 0.2), plain(model)(z0, 0.2))
    assert not torch.allclose(velocity(z0, 0.7), plain(model)(z0, 0.7))


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_weights_0_and_1_give_the_two_ends(kind: str) -> None:
    a, b = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(between(a, 2 * b, 0.0, kind), a, atol=1e-6)
    assert torch.allclose(between(a, 2 * b, 1.0, kind), 2 * b, atol=1e-6)


def test_frame_weights_are_evenly_spaced_with_both_ends() -> None:
    assert frame_weights(5) == [0, 0.25, 0.5, 0.75, 1]
    assert frame_weights(2) == [0, 1]


def test_lerp_is_straight() -> None:
    a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    assert torch.equal(between(a, b, 0.25), torch.tensor([[3.0, 2.0]]))


def test_slerp_moves_along_the_circle_with_linear_norm() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    frames = torch.cat([between(a, b, weight, "slerp") for weight in (0, 1 / 3, 2 / 3, 1)])
    assert torch.allclose(frames.norm(dim=1), torch.tensor([2, 8 / 3, 10 / 3, 4]), atol=1e-5)
    degrees = torch.rad2deg(torch.atan2(frames[:, 1], frames[:, 0]))
    assert torch.allclose(degrees, torch.tensor([0.0, 30, 60, 90]), atol=1e-3)


def test_slerp_of_parallel_latents_is_straight_and_finite() -> None:
    a = torch.randn(*LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(between(a, 3 * a, 0.5, "slerp"), 2 * a, atol=1e-5)


def test_invalid_interpolations_are_user_errors() -> None:
    a = torch.ones(LATENT)
    with pytest.raises(UserError, match="at least 2 frames, got 1"):
        frame_weights(1)
    with pytest.raises(UserError, match=r"Unknown interpolation 'slrp'\. Did you mean 'slerp'"):
        between(a, a, 0.5, "slrp")
    with pytest.raises(UserError, match="use lerp"):
        between(a, torch.zeros(LATENT), 0.5, "slerp")


def test_arithmetic_adds_the_scaled_difference() -> None:
    base, plus, minus = torch.randn(3, 2, *LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(arithmetic(base, plus, minus, 0.5), base + 0.5 * (plus - minus), atol=1e-6)
    assert torch.allclose(arithmetic(base, plus, strength=2.0), base + 2 * plus)
    assert torch.allclose(arithmetic(base, minus=minus), base - minus)
    assert torch.equal(arithmetic(base), base)
    assert torch.allclose(arithmetic(base, plus, minus, 0.0), base)


def test_restandardised_arithmetic_has_mean_zero_and_deviation_one_per_sample() -> None:
    base, plus = 5 + torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(0))
    result = arithmetic(base, plus, strength=3.0, restandardise=True)
    assert torch.allclose(result.flatten(1).mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(result.flatten(1).std(1), torch.ones(3), atol=1e-5)
    plain_sum = arithmetic(base, plus, strength=3.0)
    correlation = torch.corrcoef(torch.stack([result[0].flatten(), plain_sum[0].flatten()]))[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-5)


def test_a_constant_result_cannot_be_restandardised() -> None:
    base = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="same value everywhere"):
        arithmetic(base, minus=base, restandardise=True)
