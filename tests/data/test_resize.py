"""Centred crops keep the middle, and bicubic resizing equals MATLAB's."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from crossflow.data.images import load_image
from crossflow.data.resize import center_crop_resize, imresize_matlab


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_centre_crop_keeps_the_middle():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (center_crop_resize(image, 10) == 200).all()
    assert (center_crop_resize(image.transpose(1, 0, 2), 5) == 200).all()


@pytest.mark.parametrize("size", [1, 7, 64, (12, 5), (1, 40)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (33, 20)])
def test_centre_crop_has_the_requested_size(shape, size):
    expected = (size, size) if isinstance(size, int) else size
    assert center_crop_resize(noise(*shape), size).shape == (*expected, 3)
    assert center_crop_resize(np.ones(shape, np.float32), size, resample="nearest").shape == expected


def test_nearest_crop_is_registered_with_the_picture_and_mixes_nothing():
    depth = np.repeat(np.repeat(np.arange(1, 13, dtype=np.float32).reshape(3, 4), 9, axis=0), 9, axis=1)
    small = center_crop_resize(depth, 3, resample="nearest")
    np.testing.assert_array_equal(small, [[1, 2, 3], [5, 6, 7], [9, 10, 11]])
    picture = np.repeat(depth[..., None].astype(np.uint8) * 10, 3, axis=-1)
    np.testing.assert_allclose(center_crop_resize(picture, 27)[..., 0] / 10, depth[:, 4:31], atol=0.1)


def direct_imresize(row, scale):
    """MATLAB's rule for one row, written with loops."""
    length = len(row)
    out = []
    for i in range(1, int(np.ceil(length * scale)) + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        narrow = min(scale, 1.0)
        total = weight_sum = 0.0
        for j in range(int(np.floor(u - 2 / narrow)) - 1, int(np.ceil(u + 2 / narrow)) + 2):
            x = abs((u - j) * narrow)
            if x <= 1:
                weight = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x <= 2:
                weight = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            else:
                weight = 0.0
            mirrored = (j - 1) % (2 * length)
            total += weight * row[mirrored if mirrored < length else 2 * length - 1 - mirrored]
            weight_sum += weight
        out.append(total / weight_sum)
    return np.array(out)


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 0.7, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 24])
def test_imresize_equals_the_rule_for_one_row(length, scale):
    row = np.random.default_rng(length).normal(size=length)
    expected = direct_imresize(row, scale)
    square = imresize_matlab(np.outer(np.ones(length), row), scale)
    np.testing.assert_allclose(square[0], expected, atol=1e-12)
    np.testing.assert_allclose(imresize_matlab(np.outer(row, np.ones(length)), scale)[:, 0], expected, atol=1e-12)


def test_imresize_of_uint8_rounds_after_each_pass():
    image = noise(20, 28)
    height_first = np.stack([[direct_imresize(c, 0.5) for c in channel.T] for channel in np.moveaxis(image, -1, 0)])
    rounded = np.clip(np.floor(height_first + 0.5), 0, 255)  # (3, W, H / 2)
    both = np.stack([[direct_imresize(c, 0.5) for c in channel.T] for channel in rounded])
    expected = np.clip(np.floor(both + 0.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    result = imresize_matlab(image, 0.5)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


# sha-256 of the pixels of the MATLAB-made low-resolution files of SelfExSR (Huang et al., CVPR 2015), x4.
SELFEXSR_SET5_X4 = {
    "baby.png": "08155c10a5fb09256ee15a04d1cbea46331400fb537b1bb5b0697b42b979cf27",
    "bird.png": "41763f1c1ab0238c565f4195bd1ece82ac42a6a3d7031fe60a92fc6e280a4c90",
    "butterfly.png": "44964b84fa42882e6cc0c32824a4d77809f6f4a5e9e8dd3aa27b740d97e972a6",
    "head.png": "701b5b1c01f0450fa2f9981abb5bbc0370d6ccfd83ece3c23f77f341f42e81be",
    "woman.png": "5309aa740cc2c8d5ccafd47603b9b799d05c8fba346f0f915801157425328c97",
}


@pytest.mark.parametrize("name", SELFEXSR_SET5_X4)
def test_imresize_equals_published_matlab_output(name):
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    high = load_image(Path(root) / "data" / "sr" / "Set5" / name)
    high = high[: high.shape[0] // 4 * 4, : high.shape[1] // 4 * 4]
    low = imresize_matlab(high, 1 / 4, border="repeat")
    assert hashlib.sha256(low.tobytes()).hexdigest() == SELFEXSR_SET5_X4[name]


def test_imresize_refuses_invalid_arguments():
    for image, scale, reason in (
        (noise(4, 4), 0, "scale"),
        (noise(4, 4), float("nan"), "scale"),
        (np.zeros((4, 4), np.int32), 0.5, "int32"),
        (np.zeros((0, 4)), 0.5, "at least one pixel"),
    ):
        with pytest.raises(ValueError, match=reason):
            imresize_matlab(image, scale)
