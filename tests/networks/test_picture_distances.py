"""Distances between pictures: zero of equal ones, larger for worse ones, differentiable, and from named networks."""

import pytest
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.networks.picture_distances import NAMES, picture_distance

TINY = "timm:test_resnet@random"


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


@pytest.mark.parametrize("name", NAMES)
def test_a_distance_grows_from_zero_and_leads_back(name: str, picture: Tensor) -> None:
    distance = picture_distance(name, TINY if name == "features" else None)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    near, far = picture + 0.02 * noise, (picture + 0.3 * noise).requires_grad_()
    assert torch.allclose(distance(picture, picture), torch.zeros(2), atol=1e-6)
    assert (distance(near, picture) > 0).all()
    assert (distance(near, picture) < distance(far, picture)).all()
    before = distance(far, picture)
    (gradient,) = torch.autograd.grad(before.sum(), far)
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (distance(far - 0.5 * unit, picture) < before).all()


def test_l1_is_the_mean_absolute_difference() -> None:
    assert picture_distance("l1")(torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)).tolist() == [0.5]


def test_unknown_distances_and_networks_are_user_errors() -> None:
    with pytest.raises(UserError, match="Unknown distance between pictures 'l2'"):
        picture_distance("l2")
    with pytest.raises(UserError, match="Unknown network 'vgg'"):
        picture_distance("features", "vgg")
