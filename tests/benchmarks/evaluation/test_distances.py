"""Distances equal their formulas, and are called FID, KID and IS only when Inception measures."""

import numpy as np
import pytest
import torch

from crossflow.benchmarks.evaluation.distances import class_score, distances, frechet_distance, kernel_distance
from crossflow.benchmarks.evaluation.statistics import Accumulator, Statistics
from crossflow.core.errors import UserError


def features(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, 6)) * [1, 2, 3, 1, 1, 0.5] + shift).astype(np.float32)


def statistics(*batches: np.ndarray) -> Statistics:
    accumulator = Accumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator.statistics()


def by_formula(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_frechet_distance_equals_the_formula_for_any_batches(shift: float) -> None:
    a, b = features(200, 0), features(150, 1, shift)
    expected = by_formula(a, b)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)
    parts = statistics(a[:7], a[7:120], a[120:]), statistics(b[:1], b[1:])
    assert frechet_distance(*parts) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_frechet_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = torch.nn.Identity()
    network.num_features = 6
    metric = FrechetInceptionDistance(feature=network, normalize=True)
    a, b = features(90, 0), features(80, 1, 0.3)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(a.astype(np.float64)), real=True)
    metric.update(torch.from_numpy(b.astype(np.float64)), real=False)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(float(metric.compute()), rel=1e-5)


@pytest.mark.slow
def test_kernel_distance_is_the_unbiased_mmd_and_repeats() -> None:
    a, b = features(60, 0), features(60, 1, 1.0)
    kernel = lambda x, y: (x.astype(np.float64) @ y.T.astype(np.float64) / 6 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (60 * 59)  # noqa: E731
    expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b, 0) == pytest.approx(expected, rel=1e-4)
    many, more = features(1500, 0), features(1500, 1)
    assert kernel_distance(many, more, 5) == kernel_distance(many, more, 5)
    assert kernel_distance(many, more, 5) != kernel_distance(many, more, 6)


@pytest.mark.slow
def test_class_score_of_known_logits() -> None:
    certain = torch.eye(4).repeat(1000, 1) * 100
    assert class_score(certain, 0) == pytest.approx(4, rel=0.02)
    assert class_score(torch.zeros(40, 4), 0) == pytest.approx(1)


def test_only_distances_by_inception_are_called_fid_kid_and_is() -> None:
    batches = [{"features": features(40, 0), "logits": features(40, 2)}]
    real = statistics(features(40, 1))
    numbers = ("fid", "kid", "is")
    assert set(distances(numbers, batches, real, True)[0]) == {"fid", "kid", "is"}
    others, notes = distances(numbers, batches, real, False)
    assert set(others) == {"frechet_distance", "kernel_distance", "class_score"}
    assert notes == []
    values, notes = distances(("fid", "is"), [{"features": features(4, 0)}], real, False)
    assert set(values) == {"frechet_distance"}
    assert "does not classify" in notes[0]
    assert "fewer than the 6 features" in notes[1]


def test_too_few_pictures_and_features_of_another_network_are_refused() -> None:
    real = statistics(features(40, 1))
    with pytest.raises(UserError, match="at least two pictures"):
        distances(("fid",), [], real, True)
    with pytest.raises(UserError, match="from different networks"):
        distances(("fid",), [{"features": features(9, 0)[:, :3]}], real, True)


def test_a_kernel_distance_needs_features_of_real_pictures() -> None:
    moments = statistics(features(40, 1))
    published = Statistics(moments.mean, moments.covariance, None, np.zeros((0, 6), np.float32))
    batches = [{"features": features(40, 0)}]
    assert distances(("fid",), batches, published, True)[0]["fid"] > 0
    with pytest.raises(UserError, match="needs features of real pictures"):
        distances(("kid",), batches, published, True)


def test_distances_do_not_wait_for_other_ranks(monkeypatch) -> None:
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    batches = [{"features": features(40, 0), "logits": features(40, 2)}]
    values, _ = distances(("fid", "kid", "is"), batches, statistics(features(40, 1)), True)
    assert set(values) == {"fid", "kid", "is"}
