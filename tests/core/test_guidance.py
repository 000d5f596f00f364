"""Guidance: drawing and rotating in training; indicator, autoguidance, interval and zero-init in sampling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossflow.core.batch import Condition
from crossflow.core.guidance import (
    autoguidance,
    draw_unconditional,
    indicator_guidance,
    plain,
    rotate_targets,
    zero_init,
)
from crossflow.core.model import CrossFlow, as_flags
from crossflow.core.source import SourceEncoder

LATENT = (2, 4, 4)
T = 0.4


@pytest.fixture
def make(tiny_dit: Callable) -> Callable[..., CrossFlow]:
    def model(seed: int = 0, **kwargs: int) -> CrossFlow:
        return CrossFlow(SourceEncoder(None, "gaussian", LATENT), tiny_dit(LATENT, seed=seed, **kwargs))

    return model


def z(n: int = 3) -> Tensor:
    return torch.randn(n, *LATENT, generator=torch.Generator().manual_seed(0))


def test_samples_are_drawn_with_the_drop_probability() -> None:
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    assert draw_unconditional([uniform], 0.1)[0].float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not draw_unconditional([uniform], 0.0)[0].any()


def test_a_single_drawn_sample_stays_conditional() -> None:
    assert draw_unconditional([torch.tensor([0.9, 0.05, 0.9])], 0.1)[0].tolist() == [False, False, False]
    assert draw_unconditional([torch.tensor([0.05, 0.9, 0.01])], 0.1)[0].tolist() == [True, False, True]


def test_targets_rotate_among_the_unconditional_and_the_others_keep_theirs() -> None:
    target = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 3, 3)
    weight = target[:, :1] + 10
    unconditional = torch.tensor([False, True, False, True, True, False])
    (rotated,), (weights,) = rotate_targets([target], [unconditional]), rotate_targets([weight], [unconditional])
    assert rotated[:, 0, 0, 0].tolist() == [0, 4, 2, 1, 3, 5]
    assert torch.equal(weights, rotated[:, :1] + 10), "a weight goes with its target"
    assert target[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5], "the input is not modified"


def test_the_rotation_does_not_depend_on_the_parts() -> None:
    target, uniform = torch.arange(12.0), torch.rand(12, generator=torch.Generator().manual_seed(1))
    (whole,) = rotate_targets([target], draw_unconditional([uniform], 0.45))
    assert (whole != target).sum() == (uniform < 0.45).sum() > 2
    for num in (2, 3, 4, 6, 12):
        flags = draw_unconditional(uniform.chunk(num), 0.45)
        assert torch.equal(torch.cat(flags), uniform < 0.45)
        assert torch.equal(torch.cat(rotate_targets(target.chunk(num), flags)), whole)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_each_unconditional_sample_takes_the_target_of_the_one_before_it(num_parts: int, share: float) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(16, 2, 3, generator=generator)
        flags = torch.rand(16, generator=generator) < share
        expected = target.clone()
        expected[flags] = target[flags].roll(1, 0)
        rotated = rotate_targets(target.chunk(num_parts), flags.chunk(num_parts))
        assert torch.equal(torch.cat(rotated), expected)


def test_no_unconditional_sample_takes_its_own_target() -> None:
    for seed in range(20):
        unconditional = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.5
        if unconditional.sum() < 2:
            continue
        (rotated,) = rotate_targets([torch.arange(9.0)[:, None]], [unconditional])
        moved = rotated[:, 0] != torch.arange(9.0)
        assert torch.equal(moved, unconditional)
        assert rotated[:, 0].sort().values.tolist() == list(range(9)), "each target is used once"


def test_unrotated_targets_keep_their_gradients() -> None:
    target = torch.randn(4, 3, requires_grad=True)
    rotate_targets([target], [torch.tensor([True, True, False, False])])[0].sum().backward()
    assert target.grad is not None
    assert target.grad.sum(1).tolist() == [0, 0, 3, 3]


@torch.no_grad()
def test_guidance_in_one_batch_equals_two_passes(make: Callable[..., CrossFlow]) -> None:
    model = make()
    t = torch.full((3,), T)
    cond = model.velocity(z(), t, as_flags(False, z()))
    uncond = model.velocity(z(), t, as_flags(True, z()))
    assert (cond - uncond).abs().max() > 1e-3
    guided = indicator_guidance(model, 3.5)(z(), T)
    assert torch.allclose(guided, uncond + 3.5 * (cond - uncond), atol=1e-5)
    assert torch.allclose(indicator_guidance(model, 0.0)(z(), T), uncond, atol=1e-6)


@torch.no_grad()
def test_guidance_of_a_baseline_drops_its_condition(make: Callable[..., CrossFlow]) -> None:
    model = make(context_dim=6, grid_channels=1)
    condition = Condition(torch.randn(3, 5, 6), torch.rand(3, 5) < 0.7, torch.randn(3, 1, 4, 4))
    t = torch.full((3,), T)
    cond = model.velocity(z(), t, as_flags(False, z()), condition)
    uncond = model.velocity(z(), t, as_flags(True, z()), condition)
    assert torch.allclose(indicator_guidance(model, 2.0, condition)(z(), T), 2 * cond - uncond, atol=1e-5)


@torch.no_grad()
def test_scale_one_is_the_plain_velocity_in_one_pass(make: Callable[..., CrossFlow]) -> None:
    model, sizes = make(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert torch.equal(indicator_guidance(model, 1.0)(z(), T), plain(model)(z(), T))
    indicator_guidance(model, 2.0)(z(), T)
    assert sizes == [3, 3, 6]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["indicator", "autoguidance"])
def test_guidance_acts_inside_its_interval_ends_included(make: Callable[..., CrossFlow], kind: str) -> None:
    model, weak = make(), make(seed=1)
    if kind == "indicator":
        velocity, everywhere = indicator_guidance(model, 4.0, None, (0.1, 0.7)), indicator_guidance(model, 4.0)
    else:
        velocity = autoguidance(model, weak, 4.0, interval=(0.1, 0.7))
        everywhere = autoguidance(model, weak, 4.0)
    for time, guided in ((0.05, False), (0.1, True), (0.4, True), (0.7, True), (0.72, False)):
        assert torch.equal(velocity(z(), time), (everywhere if guided else plain(model))(z(), time)), time


@torch.no_grad()
def test_autoguidance_leads_away_from_the_weak_model(make: Callable[..., CrossFlow]) -> None:
    model, weak = make(), make(seed=1)
    strong, poor = plain(model)(z(), T), plain(weak)(z(), T)
    assert torch.allclose(autoguidance(model, weak, 2.5)(z(), T), poor + 2.5 * (strong - poor), atol=1e-6)
    assert torch.equal(autoguidance(model, weak, 0.0)(z(), T), poor)


@torch.no_grad()
def test_without_guidance_the_weak_model_is_not_evaluated(make: Callable[..., CrossFlow]) -> None:
    model, weak = make(), make(seed=1)
    calls: list[int] = []
    weak.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(autoguidance(model, weak, 1.0)(z(), T), plain(model)(z(), T))
    assert calls == []
    autoguidance(model, weak, 2.0)(z(), T)
    assert calls == [1]


@pytest.mark.parametrize("steps", [7, 10, 50, 100])
@pytest.mark.parametrize("zeroed", [1, 3])
def test_zero_init_zeroes_just_the_first_steps(steps: int, zeroed: int) -> None:
    velocity = zero_init(lambda z, t: torch.ones_like(z), zeroed / steps)
    values = [velocity(torch.zeros(1), i / steps).item() for i in range(steps)]
    assert values == [0.0] * zeroed + [1.0] * (steps - zeroed)


@torch.no_grad()
def test_velocity_has_the_type_of_the_state_under_autocast(make: Callable[..., CrossFlow]) -> None:
    model = make()
    exact = plain(model)(z(), T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = plain(model)(z(), T)
    assert velocity.dtype == torch.float32
    assert torch.allclose(velocity, exact, atol=0.05)
