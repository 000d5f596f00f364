"""Confidence intervals: of a mean by the bootstrap, of a share by Wilson's score, of a mean of shares."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979): items are resampled with replacement.

    Args:
        values: one number per item, at least two.
        level: share of resampled means inside the interval, in (0, 1).
        num_resamples: number of resamples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        (low, high)
    """
    numbers = np.asarray(values, dtype=np.float64)
    means = [numbers[rows].mean(axis=1) for rows in resamples(len(numbers), num_resamples, seed)]
    return percentile_interval(np.concatenate(means).tolist(), level)


def resamples(num_items: int, num_resamples: int, seed: int) -> Iterable[np.ndarray]:
    """Item indices drawn with replacement, `num_resamples` rows in all, in arrays (rows, num_items) of bounded size."""
    if num_items < 2:
        raise ValueError(f"Expected at least two items to resample, got {num_items}.")
    random = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // num_items)
    for start in range(0, num_resamples, rows):
        yield random.integers(0, num_items, (min(rows, num_resamples - start), num_items))


def percentile_interval(statistics: Sequence[float], level: float) -> tuple[float, float]:
    """The middle `level` of the statistics, as (low, high)."""
    _check_level(level)
    low, high = np.quantile(np.asarray(statistics, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): (low, high) in [0, 1], of positive width also at shares 0 and 1.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z the normal quantile of (1 + level) / 2.

    >>> [round(bound, 3) for bound in wilson_interval(0, 10)]
    [0.0, 0.278]
    """
    _check_level(level)
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"Expected 0 <= successes <= trials and a trial, got {successes} successes in {trials}.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, spread = successes / trials, z * z / trials
    middle = p + spread / 2
    half = math.sqrt(p * (1 - p) * spread + spread * spread / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def mean_share_interval(groups: Sequence[Sequence[int]], level: float = 0.95) -> tuple[float, float]:
    """Interval of the unweighted mean of the shares of several groups of 0s and 1s, from Wilson's interval of each.

    With K groups, low = mean - sqrt(sum (p_k - low_k)^2) / K, and high alike (Zou & Donner 2008). Unlike a bootstrap
    within the groups it has a width when the items of each group agree.

    >>> [round(bound, 3) for bound in mean_share_interval([[1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]])]
    [0.057, 0.412]
    """
    shares = [sum(group) / len(group) for group in groups]
    bounds = [wilson_interval(sum(group), len(group), level) for group in groups]
    mean = math.fsum(shares) / len(groups)
    below = math.sqrt(math.fsum((share - low) ** 2 for share, (low, _) in zip(shares, bounds, strict=True)))
    above = math.sqrt(math.fsum((high - share) ** 2 for share, (_, high) in zip(shares, bounds, strict=True)))
    return mean - below / len(groups), mean + above / len(groups)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"Expected a level in (0, 1), got {level}.")
