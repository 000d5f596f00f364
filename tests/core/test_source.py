"""Posterior and the four kinds of source."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.source import LOG_VAR_RANGE, Posterior, SourceEncoder, SourceKind

KINDS = get_args(SourceKind)


class Trunk(nn.Module):
    """(B, D) -> (B, 2, *latent), linear."""

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        self.out = nn.Linear(5, 2 * math.prod(latent_shape))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(features).unflatten(1, (2, *self.latent_shape))


def encoder(kind: SourceKind, latent_shape: tuple[int, ...] = (2, 3, 3), noise_scale: float = 1.0) -> SourceEncoder:
    torch.manual_seed(0)
    trunk = None if kind == "gaussian" else Trunk(latent_shape)
    return SourceEncoder(trunk, kind, latent_shape, noise_scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent_shape", [(2, 3, 3), (7, 4)])
def test_a_sample_has_the_shape_of_the_latent(kind: SourceKind, latent_shape: tuple[int, ...]) -> None:
    posterior = encoder(kind, latent_shape)(torch.randn(6, 5))
    assert posterior.sample().shape == posterior.mode().shape == posterior.mean.shape == (6, *latent_shape)
    assert posterior.kl().shape == (6,)


def test_sample_has_the_posteriors_mean_and_variance() -> None:
    mean, log_var = torch.tensor([[1.5, -2.0]]), torch.tensor([[math.log(4.0), math.log(0.25)]])
    many = Posterior(mean.expand(20000, 2), log_var.expand(20000, 2))
    z0 = many.sample(generator=torch.Generator().manual_seed(0))
    assert torch.allclose(z0.mean(0), mean[0], atol=0.05)
    assert torch.allclose(z0.var(0), torch.tensor([4.0, 0.25]), rtol=0.05)


def test_sample_is_mean_plus_deviation_times_noise() -> None:
    noise = torch.randn(2, 3)
    posterior = Posterior(torch.full((2, 3), 3.0), torch.full((2, 3), math.log(4.0)))
    assert torch.allclose(posterior.sample(noise=noise), 3 + 2 * noise)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_the_same_generator_gives_the_same_sample() -> None:
    posterior = Posterior(torch.zeros(2, 3), torch.zeros(2, 3))
    first, second = (posterior.sample(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_point_posterior_ignores_noise_and_has_zero_kl() -> None:
    point = Posterior(torch.ones(2, 3))
    assert torch.equal(point.sample(noise=torch.randn(2, 3)), point.mean)
    assert torch.equal(point.kl(), torch.zeros(2))


def test_kl_form_by_name() -> None:
    posterior = Posterior(torch.full((2, 3), 2.0), torch.zeros(2, 3))
    assert torch.allclose(posterior.kl("standard"), torch.full((2,), 6.0))
    assert torch.allclose(posterior.kl("variance"), torch.zeros(2))
    with pytest.raises(UserError, match=r"Unknown KL form 'relesed'\. Did you mean 'released'"):
        posterior.kl("relesed")


def test_variational_reads_both_halves_of_the_trunk() -> None:
    source, x = encoder("variational"), torch.randn(4, 5)
    assert source.trunk is not None
    halves = source.trunk(x, None)
    posterior = source(x)
    assert torch.equal(posterior.mean, halves[:, 0])
    assert posterior.log_var is not None
    assert torch.equal(posterior.log_var, halves[:, 1])


def test_deterministic_is_a_point() -> None:
    posterior = encoder("deterministic")(torch.randn(4, 5))
    assert posterior.log_var is None
    assert torch.equal(posterior.sample(), posterior.mean)


def test_noisy_adds_noise_of_its_scale() -> None:
    posterior = encoder("noisy", noise_scale=0.3)(torch.randn(4, 5))
    noise = torch.randn(4, 2, 3, 3)
    assert torch.allclose(posterior.sample(noise=noise), posterior.mean + 0.3 * noise, atol=1e-6)


def test_gaussian_is_standard_normal_and_has_no_trunk() -> None:
    source = encoder("gaussian")
    assert source.trunk is None
    assert list(source.parameters()) == []
    noise = torch.randn(4, 2, 3, 3)
    assert torch.equal(source(torch.randn(4, 5)).sample(noise=noise), noise)
    with pytest.raises(AssertionError):
        SourceEncoder(Trunk((2,)), "gaussian", (2,))
    with pytest.raises(AssertionError):
        SourceEncoder(None, "variational", (2,))


@pytest.mark.parametrize("kind", ["variational", "deterministic", "noisy"])
def test_gradient_of_a_sample_reaches_features_and_trunk(kind: SourceKind) -> None:
    source, x = encoder(kind), torch.randn(4, 5, requires_grad=True)
    source(x).sample(noise=torch.randn(4, 2, 3, 3)).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
    for name, parameter in source.named_parameters():
        assert parameter.grad is not None, name
        mean, second = parameter.grad.unflatten(0, (2, -1))
        assert (mean != 0).all(), name
        assert bool((second != 0).all()) == (kind == "variational"), "only variational reads the second half"


def test_extreme_log_variance_stays_finite_and_half_precision_trunks_give_float32() -> None:
    class Extreme(nn.Module):
        def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
            return torch.stack([features, 1e4 * features], dim=1).to(torch.float16)

    posterior = SourceEncoder(Extreme(), "variational", (2,))(torch.tensor([[-1.0, 1.0]]))
    assert posterior.mean.dtype == torch.float32
    assert posterior.log_var is not None
    assert posterior.log_var.tolist() == [list(LOG_VAR_RANGE)]
    assert posterior.sample().isfinite().all()
    assert posterior.kl().isfinite().all()


def test_unknown_kind_suggests_similar_names() -> None:
    with pytest.raises(UserError, match=r"Unknown source kind 'variatonal'\. Did you mean 'variational'"):
        SourceEncoder(Trunk((2,)), "variatonal", (2,))  # type: ignore[arg-type]
