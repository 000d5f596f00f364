"""The depth errors equal their formulas; alignment undoes what it is meant to undo; odd inputs have defined results."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.data.images import load_depth_png
from crossflow.tasks.depth.metric import CROPS, DepthMetric

NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


def depth(shape=(20, 30), seed=0, low=0.5, high=9.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def score(output, truth, **options):
    return DepthMetric(**options).score(output, truth)


def by_hand(p, g):
    """Pixel by pixel, in plain Python numbers, as the papers print the formulas."""
    pairs = [(float(a), float(b)) for a, b in zip(np.ravel(p), np.ravel(g), strict=True)]
    n = len(pairs)
    d = [math.log(a) - math.log(b) for a, b in pairs]
    return {
        "abs_rel": sum(abs(a - b) / b for a, b in pairs) / n,
        "sq_rel": sum((a - b) ** 2 / b for a, b in pairs) / n,
        "rmse": math.sqrt(sum((a - b) ** 2 for a, b in pairs) / n),
        "rmse_log": math.sqrt(sum(x * x for x in d) / n),
        "log10": sum(abs(math.log10(a) - math.log10(b)) for a, b in pairs) / n,
        "silog": 100 * math.sqrt(max(0.0, sum(x * x for x in d) / n - (sum(d) / n) ** 2)),
        **{f"delta{k}": sum(max(a / b, b / a) < 1.25**k for a, b in pairs) / n for k in (1, 2, 3)},
    }


@pytest.mark.parametrize("seed", range(5))
def test_numbers_equal_the_formulas(seed):
    truth, output = depth(seed=seed), depth(seed=seed + 100)
    row = score(output, truth)
    assert row.pop("num_pixels") == 600
    assert row == pytest.approx(by_hand(output, truth), rel=1e-9, abs=1e-12)
    assert tuple(row) == NAMES


def test_perfect_prediction():
    row = score(depth(), depth())
    assert [row[name] for name in NAMES] == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_known_values_for_a_prediction_twice_too_far():
    row = score(2 * depth(), depth())
    assert row["abs_rel"] == pytest.approx(1)
    assert row["rmse_log"] == pytest.approx(math.log(2), rel=1e-6)
    assert row["silog"] == pytest.approx(0, abs=1e-4)
    assert (row["delta1"], row["delta2"], row["delta3"]) == (0, 0, 0)
    assert score(1.5 * depth(), depth())["delta2"] == 1


def test_ratio_at_the_threshold_is_outside():
    assert score(np.full((1, 1), 5.0), np.full((1, 1), 4.0))["delta1"] == 0


def test_unmeasured_pixels_do_not_count():
    truth, output = depth(), depth(seed=1)
    holes = truth.copy()
    holes[0, :5] = 0, -1, np.nan, np.inf, 0
    output[0, :5] = np.nan
    row = score(output, holes)
    assert row["num_pixels"] == 595
    expected = by_hand(np.ravel(output)[5:], np.ravel(truth)[5:])
    assert row["rmse"] == pytest.approx(expected["rmse"], rel=1e-9)


def test_limits_are_strict_for_truth_and_clip_predictions():
    truth = np.array([[1.0, 2.0, 10.0, 12.0]])
    row = score(np.array([[-5.0, 99.0, 1.0, 1.0]]), truth, min_depth=0.1, max_depth=10.0)
    assert row["num_pixels"] == 2
    assert row["abs_rel"] == pytest.approx((0.9 / 1 + 8 / 2) / 2)


def test_median_alignment_removes_scale():
    truth = depth(shape=(21, 31))
    row = score(truth * 0.01, truth, alignment="median")
    assert row["abs_rel"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="median is -1"):
        score(np.full((2, 2), -1.0), np.ones((2, 2)), alignment="median")


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (5.0, -20.0), (-0.5, 3.0), (1e4, 1e5)])
def test_affine_alignment_removes_scale_and_shift(scale, shift):
    truth = depth().astype(np.float64)
    assert score(truth * scale + shift, truth, alignment="affine")["rmse"] == pytest.approx(0, abs=1e-6)


def test_affine_alignment_is_least_squares():
    truth, output = depth().astype(np.float64), depth(seed=5).astype(np.float64) + depth()
    design = np.stack([output.ravel(), np.ones(output.size)], axis=1)
    (s, t), *_ = np.linalg.lstsq(design, truth.ravel(), rcond=None)
    assert score(output, truth, alignment="affine")["rmse"] == pytest.approx(
        by_hand(np.maximum(s * output + t, 1e-3), truth)["rmse"], rel=1e-9
    )


def test_disparity_alignment_removes_scale_and_shift_of_disparity():
    truth = depth().astype(np.float64)
    output = 1 / (0.7 / truth + 0.05)
    assert score(output, truth, alignment="affine", space="disparity")["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert score(output, truth, alignment="affine")["abs_rel"] > 0.01


def test_disparity_at_or_below_zero_is_the_farthest_depth():
    truth = np.array([[1.0, 2.0, 4.0, 8.0]])
    output = np.array([[1.0, 1e6, 1e6, -1.0]])
    for cap, farthest in ((None, 8.0), (20.0, 20.0)):
        row = score(output, truth, alignment="affine", space="disparity", max_depth=cap)
        assert all(math.isfinite(row[name]) for name in NAMES)
        assert row["rmse"] <= farthest


@pytest.mark.parametrize("value", [0.0, 1e-7, 3.3, 1e6, -2.0])
@pytest.mark.parametrize("space", ["depth", "disparity"])
def test_constant_prediction_aligns_to_a_constant(value, space):
    truth = depth().astype(np.float64)
    row = score(np.full(truth.shape, value), truth, alignment="affine", space=space)
    constant = truth.mean() if space == "depth" else 1 / (1 / truth).mean()
    assert row["rmse"] == pytest.approx(by_hand(np.full(truth.shape, constant), truth)["rmse"], rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unfinite_predictions_are_an_error_that_names_the_item(bad):
    output = depth()
    output[3, 4:6] = bad
    with pytest.raises(ValueError, match="item 'frame7': the prediction is NaN or infinite at 2 of 600 pixels"):
        DepthMetric().add("frame7", output, depth())


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(20, 30\) and \(10, 30\)"):
        DepthMetric().add("x", depth(), depth((10, 30)))


def test_pictures_without_truth_are_noted_and_not_averaged():
    metric = DepthMetric()
    metric.add("empty", depth(), np.zeros((20, 30), np.float32))
    assert metric.rows[0]["num_pixels"] == 0
    with pytest.raises(UserError, match="is undefined for all"):
        metric.compute()
    metric.add("full", 2 * depth(), depth())
    result = metric.compute()
    assert result["abs_rel"] == pytest.approx(1)
    assert result["num_items"] == 2
    assert len(metric.notes) == len(NAMES)
    json.dumps(metric.rows, allow_nan=False)


def test_average_is_over_pictures_not_pixels():
    metric = DepthMetric()
    metric.add("small", np.full((1, 1), 2.0), np.full((1, 1), 1.0))
    metric.add("large", np.full((9, 9), 1.0), np.full((9, 9), 1.0))
    assert metric.compute()["abs_rel"] == pytest.approx(0.5)


def test_kitti_crops_keep_the_published_boxes():
    for crop, box in (("eigen", (124, 342, 44, 1197)), ("garg", (153, 371, 44, 1197))):
        top, bottom, left, right = box
        truth = np.zeros((375, 1242))
        truth[top:bottom, left:right] = 5.0
        inside = score(np.ones(truth.shape), truth, crop=crop)["num_pixels"]
        everywhere = score(np.ones(truth.shape), np.full(truth.shape, 5.0), crop=crop)["num_pixels"]
        assert inside == everywhere == (bottom - top) * (right - left)


def test_nyu_crop_scales_with_the_picture():
    assert score(np.ones((480, 640)), np.ones((480, 640)), crop="nyu")["num_pixels"] == 426 * 560
    assert score(np.ones((240, 320)), np.ones((240, 320)), crop="nyu")["num_pixels"] == 213 * 280
    for crop in CROPS:
        assert score(np.ones((1, 1)), np.ones((1, 1)), crop=crop)["num_pixels"] <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": "medium"},
        {"space": "dept"},
        {"crop": "gerg"},
        {"min_depth": 0.0},
        {"min_depth": 5.0, "max_depth": 2.0},
    ],
)
def test_bad_options_are_user_errors(options):
    with pytest.raises(UserError):
        DepthMetric(**options)


def test_inputs_are_not_modified_and_float32_is_enough():
    truth, output = depth(), depth(seed=3)
    before = truth.copy(), output.copy()
    row = score(output, truth, alignment="affine", max_depth=8.0)
    assert (truth == before[0]).all()
    assert (output == before[1]).all()
    assert row == pytest.approx(
        score(output.astype(np.float64), truth.astype(np.float64), alignment="affine", max_depth=8.0), rel=1e-6
    )


def test_real_frames_against_a_flat_guess():
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    folder = Path(root) / "data" / "depth"
    frames = json.loads((folder / "frames.json").read_text())
    frames = [f for f in (frames["frames"] if isinstance(frames, dict) else frames) if f["split"] == "test"]
    metric = DepthMetric("median")
    for frame in frames:
        truth = load_depth_png(folder / frame["depth"])
        metric.add(str(frame["id"]), np.ones_like(truth), truth)
    result = metric.compute()
    assert result["num_items"] == len(frames) == 17
    assert 0.1 < result["abs_rel"] < 1.0
    assert set(metric.intervals()) == set(NAMES)
