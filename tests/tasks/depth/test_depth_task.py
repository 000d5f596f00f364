"""Depth as a latent: exact both ways, missing stays missing."""

import numpy as np
import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.data.images import load_depth_png
from crossflow.data.item import Item
from crossflow.tasks import load_config, task_class
from crossflow.tasks.depth.dataset import Augmentation, coloured, example
from crossflow.tasks.depth.decoder import DepthScale


def test_random_positions_cover_wide_and_high_pictures() -> None:
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (20, 100, 3)).copy()
    for image in (ramp, ramp.transpose(1, 0, 2).copy()):
        item = Item("a", image, depth=image[..., 0].astype(np.float32) + 1)
        augmentation = Augmentation(flip=False, position="random")
        crops = [example(item, 20, augmentation, np.random.default_rng(seed))["target"] for seed in range(60)]
        assert min(crop.min() for crop in crops) < 5
        assert max(crop.max() for crop in crops) > 95
        assert all(crop.max() - crop.min() == 19 for crop in crops)  # whole squares, not zoomed
        centre = example(item, 20, Augmentation(flip=False), np.random.default_rng(0))["target"]
        assert (centre.min(), centre.max()) == (41, 60)


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
        augmented = example(item, 16, Augmentation(flip=True, crop=0.5), np.random.default_rng(seed))
        grey = (augmented["source"][0] + 1) * 127.5
        assert (grey - augmented["target"][0]).abs().max() < 12  # bicubic against nearest
        flipped.add(bool(grey[0, 0] > grey[0, -1]))
    assert flipped == {True, False}


@pytest.mark.slow
def test_colours_change_as_the_reference_says_each_picture_by_its_own_factors() -> None:
    from torchvision.transforms.v2 import functional as reference

    rgb = torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factors = torch.tensor([[0.8, 1.3, 0.5], [1.0, 1.0, 1.0], [1.2, 0.7, 1.4]])
    changed = coloured(rgb, factors)
    for before, after, (brightness, contrast, saturation) in zip(rgb, changed, factors.tolist(), strict=True):
        expected = reference.adjust_brightness((before + 1) / 2, brightness)
        expected = reference.adjust_saturation(reference.adjust_contrast(expected, contrast), saturation)
        torch.testing.assert_close(after, expected * 2 - 1, atol=2e-4, rtol=0)
    torch.testing.assert_close(changed[1], rgb[1], atol=1e-4, rtol=0)
    assert coloured(rgb, torch.ones(3, 3)) is rgb


def test_colour_factors_follow_from_the_key_and_leave_crops_as_they_were() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    item = Item("a", image, depth=np.ones((40, 40), np.float32))
    plain, jitter = Augmentation(crop=0.5), Augmentation(crop=0.5, colour=0.3)
    for seed in range(5):
        a, b, again = (example(item, 16, how, np.random.default_rng(seed)) for how in (plain, jitter, jitter))
        assert torch.equal(a["source"], b["source"])
        assert a["colour"].tolist() == [1, 1, 1]
        assert (b["colour"] - 1).abs().max() <= 0.3
        assert b["colour"].std() > 0
        assert torch.equal(b["colour"], again["colour"])


def test_depth_beyond_16_bits_of_millimetres_is_written_too(tmp_path) -> None:
    task = task_class("depth").outline(load_config("depth_tiny"))
    depth = np.array([[0.5, 65.535], [65.54, 100.0]], np.float32)
    millimetres, metres, picture = task.write_output(depth, tmp_path / "far", {})
    np.testing.assert_allclose(load_depth_png(millimetres), [[0.5, 65.535], [0, 0]], atol=1e-6)
    np.testing.assert_array_equal(np.load(metres), depth)
    assert picture.is_file()


def test_without_a_protocol_the_crop_is_taken_once_and_on_the_whole_picture(tmp_path) -> None:
    height, width = 96, 128
    place = np.arange(height * width, dtype=np.float32).reshape(height, width) / 2000 + 1  # metres that tell the pixel
    item = Item("a", np.zeros((height, width, 3), np.uint8), depth=place)
    config = load_config("depth_tiny", ["depth.crop=nyu", "depth.near=0.5", "depth.far=50"])
    scoring = task_class("depth")(config, None).scoring()
    case = scoring.case(item)
    assert scoring.options == {"crop": "none"}, "the reader's own crop would be a second one"
    inside = np.zeros((height, width), bool)
    inside[int(45 / 480 * height) : int(471 / 480 * height), int(41 / 640 * width) : int(601 / 640 * width)] = True
    scored = case.truth[case.truth > 0]
    assert set(scored.tolist()) <= set(place[inside].tolist())
    row = scoring.metric().add("a", np.full_like(case.truth, 3), case.truth)
    assert row["num_pixels"] == len(scored)
    # The centre square keeps its columns; of its rows only those outside the crop are left out.
    rows = int(471 / 480 * height) - int(45 / 480 * height)
    assert len(scored) / case.truth.size == pytest.approx(rows / height, abs=0.04)
