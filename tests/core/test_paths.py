"""Paths: closed forms, ends, velocity as the derivative; laws of training time by their quantiles."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crossflow.core.config import TimeConfig
from crossflow.core.errors import UserError
from crossflow.core.paths import (
    PATHS,
    TIME_LAWS,
    LinearPath,
    SinCosPath,
    TrainingTimes,
    bridge,
    logit_normal_time,
    shift_time,
    uniform_time,
)


@pytest.fixture
def ends() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0, z1 = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    return z0, z1


@pytest.mark.parametrize("name", PATHS.names())
@pytest.mark.parametrize("shape", [(3, 4, 4), (7, 2)])
def test_velocity_is_the_derivative_of_the_path(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    z0, z1 = torch.randn(2, 5, *shape, generator=generator, dtype=torch.float64)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-5
    path = PATHS.get(name)(sigma_min=0.05)
    numerical = (path(z0, z1, t + h).z_t - path(z0, z1, t - h).z_t) / (2 * h)
    assert torch.allclose(path(z0, z1, t).velocity, numerical, atol=1e-8)


def test_linear_path_is_equation_1_and_2(ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    z0, z1 = ends
    point = LinearPath(sigma_min=1e-2)(z0, z1, torch.full((5,), 0.25, dtype=torch.float64))
    assert torch.allclose(point.z_t, 0.25 * z1 + (1 - 0.99 * 0.25) * z0)
    assert torch.allclose(point.velocity, z1 - 0.99 * z0)
    assert torch.equal(point.t, torch.full((5,), 0.25, dtype=torch.float64))


def test_sincos_path_keeps_the_variance_and_turns_by_a_quarter(ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    z0, z1 = ends
    point = SinCosPath()(z0, z1, torch.full((5,), 0.5, dtype=torch.float64))
    assert torch.allclose(point.z_t, (z0 + z1) / math.sqrt(2))
    assert torch.allclose(point.velocity, math.pi / 2 * (z1 - z0) / math.sqrt(2))


@pytest.mark.parametrize("name", PATHS.names())
def test_path_begins_at_the_source_and_ends_at_the_target(name: str, ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    z0, z1 = ends
    path = PATHS.get(name)(sigma_min=1e-5)
    assert torch.equal(path(z0, z1, torch.zeros(5, dtype=torch.float64)).z_t, z0)
    leftover = 1e-5 if name == "linear" else 1e-12  # sigma_min of the source stays in the linear path
    end = path(z0, z1, torch.ones(5, dtype=torch.float64)).z_t
    assert torch.allclose(end, z1, atol=leftover * float(z0.abs().max()))
    assert name == "sincos" or torch.allclose(end - z1, 1e-5 * z0, atol=1e-12)


@pytest.mark.parametrize("name", PATHS.names())
def test_a_point_and_its_velocity_give_the_end(name: str, ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    z0, z1 = ends
    path = PATHS.get(name)(sigma_min=0.05)
    point = path(z0, z1, torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64))
    assert torch.allclose(path.end(point), z1, atol=1e-12)


@pytest.mark.parametrize("name", PATHS.names())
def test_a_bridge_has_the_ends_and_the_mean_of_its_path_and_its_own_variance(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z0, z1, noise = torch.randn(3, 5, 1000, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0], dtype=torch.float64)
    point = PATHS.get(name)(sigma_min=0)(z0, z1, t)
    noisy = bridge(point, noise, 0.3)
    assert torch.equal(noisy.velocity, point.velocity)
    assert torch.equal(noisy.z_t[[0, -1]], point.z_t[[0, -1]])
    both = (noisy.z_t + bridge(point, -noise, 0.3).z_t) / 2
    assert torch.allclose(both, point.z_t, atol=1e-12)
    expected = 0.09 * t * (1 - t) * noise.square().mean(1)
    assert torch.allclose((noisy.z_t - point.z_t).square().mean(1), expected, atol=1e-12)


def test_a_share_of_the_times_is_the_start_and_the_rest_keeps_its_law() -> None:
    uniform = (torch.arange(1000) + 0.5) / 1000
    t = TrainingTimes(TimeConfig(law="logit_normal", shift=2.0, at_start=0.3))(uniform)
    assert (t == 0).sum() == 300
    rest = TrainingTimes(TimeConfig(law="logit_normal", shift=2.0))((torch.arange(700) + 0.5) / 700)
    assert torch.allclose(t[300:], rest, atol=1e-4)
    assert not TrainingTimes(TimeConfig(at_start=1.0))(uniform).any()


def test_points_are_the_only_times_and_equally_frequent() -> None:
    uniform = torch.arange(1000) / 1000
    t = TrainingTimes(TimeConfig(points=(0.0, 0.25, 0.75)))(uniform)
    assert [int((t == point).sum()) for point in (0.0, 0.25, 0.75)] == [334, 333, 333]


def test_each_sample_has_its_own_time(ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    z0, z1 = ends
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    z_t = LinearPath(0.0)(z0, z1, t).z_t
    assert torch.equal(z_t[1::2], z1[1::2])
    assert torch.equal(z_t[::2], z0[::2])


def test_half_precision_targets_and_float32_sources_give_float32() -> None:
    point = LinearPath()(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.float16), torch.full((2,), 0.5))
    assert point.z_t.dtype == point.velocity.dtype == torch.float32


def test_uniform_law_is_the_identity() -> None:
    u = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_time(u), u)


def test_logit_normal_law_has_the_quantiles_of_a_logit_normal() -> None:
    probabilities = torch.tensor([0.5, 0.8413447, 0.1586553, 0.9772499])
    sigmas = torch.tensor([0.0, 1.0, -1.0, 2.0])
    assert torch.allclose(logit_normal_time(probabilities, 0.0, 1.0), sigmas.sigmoid(), atol=1e-6)
    assert torch.allclose(logit_normal_time(probabilities, -0.5, 0.7), (-0.5 + 0.7 * sigmas).sigmoid(), atol=1e-6)


def test_logit_normal_law_is_finite_and_inside_at_the_ends() -> None:
    t = logit_normal_time(torch.tensor([0.0, 1 - 2**-24]))
    assert t.dtype == torch.float32
    assert 0 < t[0] < 0.01
    assert 0.99 < t[1] < 1


@pytest.mark.parametrize("law", TIME_LAWS.names())
def test_time_laws_are_monotone_so_quantiles_go_to_quantiles(law: str) -> None:
    t = TIME_LAWS.get(law)(torch.linspace(0.001, 0.999, 200), 0.0, 1.0)
    assert (t.diff() > 0).all()


def test_shift_has_its_closed_form_and_fixed_ends() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.allclose(shift_time(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert torch.equal(shift_time(t, 1.0), t)
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3), t), "a and 1/a undo each other"


def test_unknown_path_and_law_suggest_similar_names() -> None:
    with pytest.raises(UserError, match=r"Unknown path 'liner'\. Did you mean 'linear'"):
        PATHS.get("liner")
    with pytest.raises(UserError, match=r"Unknown time law 'logitnormal'\. Did you mean 'logit_normal'"):
        TIME_LAWS.get("logitnormal")


def test_logit_normal_works_on_devices_without_float64(no_float64) -> None:
    with FakeTensorMode(), no_float64:  # a tensor of that device without the device
        t = logit_normal_time(torch.empty(3, device="mps"))
    assert (t.device.type, t.dtype) == ("mps", torch.float32)
