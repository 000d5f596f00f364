"""Posteriors in numbers: closed-form cases."""

import math

import pytest
import torch

from crossflow.core.source import Posterior
from crossflow.engine.health.posterior import PosteriorNumbers


def test_the_kl_is_that_of_the_posterior_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    posterior = Posterior(torch.randn(6, 3, 4, generator=generator), torch.randn(6, 3, 4, generator=generator))
    numbers = PosteriorNumbers.of(posterior)
    assert numbers.kl == pytest.approx(posterior.kl().mean().item() / 12, rel=1e-5)
    assert numbers.largest_kl is not None
    assert numbers.largest_kl >= numbers.kl


def test_means_and_spread_of_known_posteriors() -> None:
    mean = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
    numbers = PosteriorNumbers.of(Posterior(mean, torch.full((2, 2), math.log(4.0))))
    assert numbers.size == pytest.approx(math.sqrt(5))
    assert numbers.largest == 3
    assert numbers.spread == pytest.approx(1.5)
    assert numbers.deviation == pytest.approx(2.0)
    assert numbers.active == 0.5  # the second value is the same for all items
    assert numbers.by_value["mean"] == pytest.approx((0, 0, 1))
    assert numbers.by_value["spread"] == pytest.approx((0, 0, 3))
    assert set(numbers.by_value) == {"mean", "spread", "deviation", "kl"}


def test_a_point_has_no_deviation_and_no_kl() -> None:
    numbers = PosteriorNumbers.of(Posterior(torch.tensor([[1.0, 2.0], [-1.0, 2.0]])))
    assert (numbers.deviation, numbers.kl) == (None, None)
    assert numbers.active == 0.5


def test_noise_around_equal_means_is_not_active() -> None:
    mean = 1 + 0.01 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert PosteriorNumbers.of(Posterior(mean, torch.zeros(8, 5))).active == 0
