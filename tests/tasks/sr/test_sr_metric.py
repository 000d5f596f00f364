"""PSNR and SSIM equal their formulas, and bicubic enlargement scores what the published tables say it scores."""

import os
from pathlib import Path

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.data.images import load_image, rgb_to_y
from crossflow.data.resize import imresize_matlab
from crossflow.tasks.sr.metric import SrMetric, psnr, ssim


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def window():
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def ssim_by_hand(a, b):
    """Wang et al. 2004, one window after the other."""
    w, c1, c2 = window(), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    measured_scores = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11].astype(np.float64), b[i : i + 11, j : j + 11].astype(np.float64)
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy, cxy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
            measured_scores.append((2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(measured_scores))


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (23, 19)])
@pytest.mark.parametrize("seed", [0, 1])
def test_ssim_equals_the_formula(size, seed):
    a = noise(*size, channels=0, seed=seed)
    near = np.clip(a.astype(int) + np.random.default_rng(seed).integers(-20, 20, size), 0, 255).astype(np.uint8)
    for b in (near, noise(*size, channels=0, seed=9), 255 - a, np.zeros_like(a)):
        assert ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-6)


def test_ssim_of_colour_is_the_mean_of_its_channels():
    a, b = noise(15, 18), noise(15, 18, seed=1)
    assert ssim(a, b) == pytest.approx(np.mean([ssim_by_hand(a[..., c], b[..., c]) for c in range(3)]), abs=1e-6)


def test_psnr_equals_the_formula():
    a, b = noise(7, 9), noise(7, 9, seed=1)
    error = sum((int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)
    assert psnr(np.zeros((3, 3), np.uint8), np.full((3, 3), 255, np.uint8)) == pytest.approx(0)
    assert psnr(np.zeros((3, 3), np.uint8), np.ones((3, 3), np.uint8)) == pytest.approx(48.1308, abs=1e-4)


def test_equal_pictures_have_the_highest_values():
    metric = SrMetric()
    metric.add("same", noise(24, 24), noise(24, 24))
    assert metric.rows[0] == {"id": "same", "psnr_y": 100, "ssim_y": 1, "psnr_rgb": 100, "ssim_rgb": 1}


def test_row_is_on_the_shaved_crop_and_rounded_luma():
    truth, output = noise(30, 35), noise(30, 35, seed=1)
    a, b = output[3:27, 3:30], truth[3:27, 3:30]  # 30 x 33 is left of 30 x 35 at scale 3
    row = SrMetric(scale=3).score(output, truth)
    y_a, y_b = np.floor(rgb_to_y(a) + 0.5), np.floor(rgb_to_y(b) + 0.5)
    assert row == {"psnr_y": psnr(y_a, y_b), "ssim_y": ssim(y_a, y_b), "psnr_rgb": psnr(a, b), "ssim_rgb": ssim(a, b)}


def test_a_grey_truth_is_scored_on_its_own_channel():
    """Luma squeezes 0..255 into 16..235, which is worth 20 log10(255 / 219) = 1.32 dB."""
    truth = noise(24, 28, channels=0)
    errors = np.random.default_rng(1).integers(-20, 20, truth.shape)
    output = np.clip(truth.astype(int) + errors, 0, 255).astype(np.uint8)
    row = SrMetric(scale=4).score(np.stack([output] * 3, axis=-1), truth)
    inside = (slice(4, 20), slice(4, 24))
    assert row["psnr_y"] == row["psnr_rgb"] == psnr(output[inside], truth[inside])
    assert row["ssim_y"] == ssim(output[inside], truth[inside])
    as_colour = SrMetric(scale=4).score(np.stack([output] * 3, axis=-1), np.stack([truth] * 3, axis=-1))
    assert as_colour["psnr_y"] - row["psnr_y"] == pytest.approx(1.32, abs=0.05)


def test_output_may_have_the_cropped_size():
    truth, output = noise(30, 35), noise(30, 35, seed=1)
    assert SrMetric(scale=4).score(output[:28, :32], truth) == SrMetric(scale=4).score(output, truth)


def test_border_does_not_count():
    truth = noise(32, 32)
    output = truth.copy()
    output[:4] = output[-4:] = output[:, :4] = output[:, -4:] = 0
    assert SrMetric(4).score(output, truth)["psnr_rgb"] == 100
    assert SrMetric(4, shave=0).score(output, truth)["psnr_rgb"] < 30


def test_small_pictures_have_no_ssim():
    metric = SrMetric(4)
    metric.add("small", noise(16, 40), noise(16, 40, seed=1))
    metric.add("large", noise(40, 40), noise(40, 40, seed=1))
    assert metric.rows[0]["ssim_y"] is None
    assert metric.compute()["ssim_y"] == metric.rows[1]["ssim_y"]
    assert "ssim_y is undefined for 1 of 2 items and averages the others" in metric.notes
    with pytest.raises(ValueError, match="nothing is left"):
        metric.add("tiny", noise(8, 40), noise(8, 40))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (noise(24, 24).astype(np.float32), "rounded as it would be saved"),
        (noise(24, 24, channels=0), "rounded as it would be saved"),
        (noise(23, 24), r"\(23, 24, 3\) and the truth \(24, 24, 3\)"),
    ],
)
def test_unfit_output_is_an_error_that_names_the_item(output, reason):
    with pytest.raises(ValueError, match=f"item 'x': .*{reason}"):
        SrMetric().add("x", output, noise(24, 24))


def test_bad_options_are_user_errors():
    with pytest.raises(UserError):
        SrMetric(scale=0)
    with pytest.raises(UserError):
        SrMetric(shave=-1)


def pictures(name, pattern):
    """The pictures of a benchmark set, cut to multiples of four."""
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    for path in sorted((Path(root) / "data" / "sr" / name).glob(pattern)):
        truth = load_image(path)
        yield truth[: truth.shape[0] // 4 * 4, : truth.shape[1] // 4 * 4]


def reduced_and_enlarged(picture):
    return imresize_matlab(imresize_matlab(picture, 1 / 4), 4)


def test_bicubic_scores_what_the_tables_say():
    """Resized on luma, as the tables do."""
    inside = (slice(4, -4), slice(4, -4))
    values = []
    for truth in pictures("Set5", "*.png"):
        luma = np.floor(rgb_to_y(truth) + 0.5)
        enlarged = np.clip(np.floor(reduced_and_enlarged(luma) + 0.5), 0, 255)
        values.append((psnr(enlarged[inside], luma[inside]), ssim(enlarged[inside], luma[inside])))
    assert len(values) == 5
    assert np.mean(values, axis=0)[0] == pytest.approx(28.42, abs=0.006)
    assert np.mean(values, axis=0)[1] == pytest.approx(0.8104, abs=0.0002)


@pytest.mark.slow
def test_bicubic_resized_on_rgb_scores_almost_the_same():
    """On B100 tests/benchmarks/evaluation/test_protocols.py says so."""
    metric = SrMetric(4)
    for index, truth in enumerate(pictures("Set5", "*.png")):
        metric.add(str(index), reduced_and_enlarged(truth), truth)
    result = metric.compute()
    assert result["psnr_y"] == pytest.approx(28.42, abs=0.05)
    assert result["ssim_y"] == pytest.approx(0.8104, abs=0.002)
