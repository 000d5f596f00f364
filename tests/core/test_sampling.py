"""Generate, invert, interpolate, arithmetic."""

from collections.abc import Callable

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.core.guidance import as_flags, plain
from crossflow.core.model import CrossFlow
from crossflow.core.sampling import arithmetic, generate, guided_velocity, interpolate, invert
from crossflow.core.solvers import solve
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
    assert torch.allclose(generate(model, z0, num_steps=4, guidance_scale=2.0), z, atol=1e-5)


def test_generate_keeps_no_graph_and_gives_the_end_of_its_trajectory(make: Callable, z0: torch.Tensor) -> None:
    model = make()
    z1 = generate(model, z0, num_steps=3, solver="heun")
    with torch.no_grad():
        solution = solve(guided_velocity(model), z0, num_steps=3, solver="heun", keep_trajectory=True)
    assert not z1.requires_grad
    assert torch.equal(z1, solution.z)
    assert len(solution.trajectory) == 4
    assert solution.num_evaluations == 6


def test_an_item_is_generated_alike_alone_and_in_a_batch(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    model = make()
    whole = generate(model, z0, num_steps=5, guidance_scale=3.0)
    assert torch.allclose(generate(model, z0[1:2], num_steps=5, guidance_scale=3.0)[0], whole[1], atol=1e-5)


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5"])
def test_invert_returns_to_the_source(make: Callable[..., CrossFlow], z0: torch.Tensor, solver: str) -> None:
    model = make()
    z1 = generate(model, z0, solver=solver, num_steps=40, guidance_scale=1.5)
    assert (z1 - z0).abs().max() > 0.1
    back = invert(model, z1, solver=solver, num_steps=40, guidance_scale=1.5)
    assert torch.allclose(back, z0, atol=1e-3)


def test_zeroed_first_steps_leave_the_source_where_it_is(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    velocity = guided_velocity(make(), zero_until=1 / 50)
    with torch.no_grad():
        states = solve(velocity, z0, num_steps=50, keep_trajectory=True).trajectory
    assert torch.equal(states[1], z0)
    assert not torch.equal(states[2], z0)


def test_zero_steps_are_a_user_error(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    with pytest.raises(UserError, match="0 solver steps"):
        generate(make(), z0, num_steps=0)


@torch.no_grad()
def test_interval_holds_for_guidance_by_a_weak_model_too(make: Callable[..., CrossFlow], z0: torch.Tensor) -> None:
    model, weak = make(), make(1)
    velocity = guided_velocity(model, guidance_scale=3.0, guidance_interval=(0.5, 1.0), weak=weak)
    assert torch.equal(velocity(z0, torch.tensor(0.2)), plain(model)(z0, torch.tensor(0.2)))
    assert not torch.allclose(velocity(z0, torch.tensor(0.7)), plain(model)(z0, torch.tensor(0.7)))


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_interpolation_begins_and_ends_at_its_ends(kind: str) -> None:
    a, b = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    frames = interpolate(a, 2 * b, 5, kind)
    assert frames.shape == (5, *LATENT)
    assert torch.allclose(frames[0], a, atol=1e-6)
    assert torch.allclose(frames[-1], 2 * b, atol=1e-6)


def test_lerp_is_straight() -> None:
    a, b = torch.randn(2, *LATENT)
    assert torch.allclose(interpolate(a, b, 5)[1], 0.75 * a + 0.25 * b, atol=1e-6)


def test_slerp_keeps_to_the_circle() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    frames = interpolate(a, b, 4, "slerp")[:, 0]
    assert torch.allclose(frames.norm(dim=1), torch.tensor([2, 8 / 3, 10 / 3, 4]), atol=1e-5)
    degrees = torch.rad2deg(torch.atan2(frames[:, 1], frames[:, 0]))
    assert torch.allclose(degrees, torch.tensor([0.0, 30, 60, 90]), atol=1e-3)


def test_slerp_of_parallel_latents_is_straight_and_finite() -> None:
    a = torch.randn(*LATENT)
    assert torch.allclose(interpolate(a, 3 * a, 3, "slerp")[1], 2 * a, atol=1e-5)


def test_impossible_interpolations_say_so() -> None:
    a = torch.ones(LATENT)
    with pytest.raises(UserError, match="at least 2 frames; 1 came"):
        interpolate(a, a, 1)
    with pytest.raises(UserError, match=r"Unknown interpolation 'slrp'\. Did you mean 'slerp'"):
        interpolate(a, a, 3, "slrp")
    with pytest.raises(UserError, match="use lerp"):
        interpolate(a, torch.zeros(LATENT), 3, "slerp")


def test_arithmetic_adds_the_scaled_difference() -> None:
    base, plus, minus = torch.randn(3, 2, *LATENT)
    assert torch.allclose(arithmetic(base, plus, minus, 0.5), base + 0.5 * (plus - minus), atol=1e-6)
    assert torch.allclose(arithmetic(base, plus, strength=2.0), base + 2 * plus)
    assert torch.allclose(arithmetic(base, minus=minus), base - minus)
    assert torch.equal(arithmetic(base), base)
    assert torch.allclose(arithmetic(base, plus, minus, 0.0), base)


def test_restandardised_arithmetic_has_mean_zero_and_deviation_one_per_sample() -> None:
    base, plus = 5 + torch.randn(2, 3, *LATENT)
    result = arithmetic(base, plus, strength=3.0, restandardise=True)
    assert torch.allclose(result.flatten(1).mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(result.flatten(1).std(1), torch.ones(3), atol=1e-5)
    plain_sum = arithmetic(base, plus, strength=3.0)
    correlation = torch.corrcoef(torch.stack([result[0].flatten(), plain_sum[0].flatten()]))[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-5)
