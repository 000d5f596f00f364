"""Depth as a latent: exact both ways, missing stays missing."""

import numpy as np
import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.tasks.common.readers import Item
from crossflow.tasks.depth.dataset import Augmentation, example
from crossflow.tasks.depth.decoder import DepthScale


@pytest.mark.parametrize("target", ["log", "linear", "disparity"])
def test_depth_comes_back_and_latents_have_unit_variance(target) -> None:
    depth = torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 8 + 0.5
    depth[0, 0, :5] = 0
    scale = DepthScale.fit(target, 0.1, 100, [depth])
    z, valid = scale.encode(depth), scale.valid(depth)
    assert valid.sum() == depth.numel() - 100
    assert z[~valid].abs().max() == 0
    assert z[valid].mean().abs() < 1e-4
    assert abs(z[valid].std() - 1) < 1e-3
    torch.testing.assert_close(scale.decode(z)[valid], depth[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["log", "linear", "disparity"])
def test_decoded_depth_stays_in_range_whatever_the_latent(target) -> None:
    scale = DepthScale(target, 0.5, 20.0, 1.0, 0.4)
    decoded = scale.decode(torch.linspace(-100, 100, 201).reshape(1, 1, 1, -1))
    assert decoded.isfinite().all()
    assert decoded.min() >= 0.5
    assert decoded.max() <= 20


def test_data_without_depth_in_range_is_refused() -> None:
    with pytest.raises(UserError, match="millimetres"):
        DepthScale.fit("log", 0.1, 10, [torch.full((1, 1, 4, 4), 3000.0)])


def test_saved_scales_are_the_same(tmp_path) -> None:
    scale = DepthScale("disparity", 0.5, 20.0, 0.123456789, 0.4)
    scale.save(tmp_path)
    assert DepthScale.load(tmp_path) == scale


def test_picture_and_depth_are_cropped_and_flipped_alike() -> None:
    ramp = np.linspace(10, 240, 40).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (40, 40, 3)).copy()
    item = Item("a", image, depth=image[..., 0].astype(np.float32))
    flipped = set()
    for seed in range(20):
        one = example(item, 16, Augmentation(flip=True, crop=0.5), np.random.default_rng(seed))
        grey = (one["rgb"][0] + 1) * 127.5
        assert (grey - one["depth"][0]).abs().max() < 12  # bicubic against nearest
        flipped.add(bool(grey[0, 0] > grey[0, -1]))
    assert flipped == {True, False}
