"""Losses of decoded depth: the errors that the metric reports, and blind to what the affine protocols align."""

import numpy as np
import pytest
import torch

from crossflow.tasks.depth.losses import abs_rel, affine
from crossflow.tasks.depth.metric import DepthMetric, align_affine


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates, truths (2, 64) in metres, and where the truth is measured."""
    generator = torch.Generator().manual_seed(0)
    depth, truth = (1 + 5 * torch.rand(2, 64, generator=generator) for _ in range(2))
    return depth, truth, (torch.rand(2, 64, generator=generator) < 0.7).float()


def test_abs_rel_is_that_of_the_metric(maps) -> None:
    depth, truth, weight = maps
    row = DepthMetric().score(depth[:1].numpy(), (truth * weight)[:1].numpy())
    assert abs_rel(depth, truth, weight)[0].item() == pytest.approx(row["abs_rel"], rel=1e-5)


def test_affine_aligns_as_the_metric_and_does_not_see_scale_and_shift(maps) -> None:
    depth, truth, weight = maps
    d, g = (values[0][weight[0] > 0].double().numpy() for values in (depth, truth))
    expected = np.abs(align_affine(d, g) - g).mean() / np.abs(g - g.mean()).mean()
    assert affine(depth, truth, weight)[0].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(affine(0.3 * depth + 7, truth, weight), affine(depth, truth, weight))
    assert affine(0.3 * truth + 7, truth, weight).max() < 1e-4
    assert affine(depth, 4 * truth, weight)[0].item() == pytest.approx(expected, rel=1e-4), "no unit of length"


def test_constant_and_missing_depth_have_finite_losses_and_gradients(maps) -> None:
    _, truth, weight = maps
    for measure in (abs_rel, affine):
        depth = torch.full((2, 64), 2.0, requires_grad=True)
        loss = measure(depth, truth, torch.stack([weight[0], torch.zeros(64)]))
        loss.sum().backward()
        assert depth.grad.isfinite().all()
        assert loss[1] == 0
        assert loss[0] > 0
