"""Confidence intervals: coverage, published values, and a width where all items agree."""

import numpy as np
import pytest

from crossflow.core.intervals import bootstrap_interval, mean_share_interval, resamples, wilson_interval


def test_interval_covers_the_mean_at_its_level():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(3.0, 1.0, 40), num_resamples=200, seed=trial)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 199


def test_interval_is_a_function_of_the_seed():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    with pytest.raises(ValueError, match="at least two items to resample, got 1"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 95"):
        bootstrap_interval(values, level=95)


def test_resamples_are_rows_of_indices_in_blocks_of_bounded_size() -> None:
    blocks = list(resamples(400_000, 5, seed=0))
    assert [block.shape for block in blocks] == [(2, 400_000), (2, 400_000), (1, 400_000)]
    assert all(block.min() >= 0 and block.max() < 400_000 for block in blocks)
    assert not np.array_equal(blocks[0][0], blocks[1][0])


def test_wilson_interval_has_the_published_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(81, 263) == pytest.approx((0.25527, 0.36619), abs=1e-4)  # Newcombe (1998), table I
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_errors(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} successes in {trials}"):
        wilson_interval(successes, trials)


def test_interval_of_one_share_is_wilsons() -> None:
    assert mean_share_interval([[1, 0, 1, 1]]) == pytest.approx(wilson_interval(3, 4))


def test_interval_of_a_mean_of_shares_covers_it_at_its_level() -> None:
    generator = np.random.default_rng(0)
    probabilities = np.array([0.05, 0.5, 0.9, 0.3])
    hits = 0
    for _ in range(400):
        groups = [(generator.random(10) < p).astype(int).tolist() for p in probabilities]
        low, high = mean_share_interval(groups)
        hits += low <= probabilities.mean() <= high
    assert 370 <= hits <= 397


def test_interval_of_agreeing_items_has_positive_width() -> None:
    low, high = mean_share_interval([[1, 1], [0, 0]])
    assert 0 < low < 0.3
    assert 0.7 < high < 1
