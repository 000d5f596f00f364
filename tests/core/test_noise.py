"""Keyed noise: a row follows from its key alone."""

import math
import time
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossflow.core.noise import (
    LARGEST_SORTED,
    KeyedOrder,
    Order,
    SortedOrder,
    _normal,
    item_noise,
    key,
    keyed_generator,
    order,
    training_noise,
)


def test_training_noise_of_a_sample_is_independent_of_batch_and_order() -> None:
    whole = training_noise(3, 7, range(10), (4, 5, 6))
    part = training_noise(3, 7, [8, 2, 5], (4, 5, 6))
    for row, sample in enumerate([8, 2, 5]):
        assert torch.equal(part.source[row], whole.source[sample])
        assert part.time[row] == whole.time[sample]
        assert part.drop[row] == whole.drop[sample]


def test_training_noise_differs_by_seed_step_and_sample() -> None:
    reference = training_noise(0, 0, [0], (32,))
    for seed, step, sample in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        other = training_noise(seed, step, [sample], (32,))
        assert not torch.isclose(other.source, reference.source).any()
        assert other.time != reference.time
        assert other.drop != reference.drop


def test_training_noise_has_its_distributions() -> None:
    noise = training_noise(0, 0, range(4000), (8,))
    assert noise.source.shape == (4000, 8)
    assert noise.source.dtype == noise.time.dtype == noise.drop.dtype == torch.float32
    assert abs(noise.source.mean()) < 0.02
    assert abs(noise.source.std() - 1) < 0.02
    for uniform in (noise.time, noise.drop):
        assert 0 <= uniform.min() <= uniform.max() < 1
        assert abs(uniform.mean() - 0.5) < 0.02
        assert abs(uniform.var() - 1 / 12) < 0.005
    parts = torch.stack([noise.time, noise.drop, noise.source[:, 0]])
    assert (torch.corrcoef(parts) - torch.eye(3)).abs().max() < 0.06, "time, drop and source are independent"


@pytest.mark.parametrize("shape", [(8,), (3, 3), (4, 32, 32)])
def test_item_noise_follows_from_seed_and_id(shape: tuple[int, ...]) -> None:
    whole = item_noise(5, ["a", "b", "c"], shape)
    assert whole.shape == (3, *shape)
    assert torch.equal(item_noise(5, ["c"], shape)[0], whole[2])
    assert not torch.isclose(item_noise(6, ["c"], shape)[0], whole[2]).all()
    assert len(whole.unique()) > 0.99 * whole.numel()


def test_keys_equal_in_32_bits_give_different_noise() -> None:
    """torch's CPU generator, which takes 32 bits of a seed, draws the same numbers for these."""
    first, second = "4596", "59334"
    assert key("item", 0, first) % 2**32 == key("item", 0, second) % 2**32
    noise = item_noise(0, [first, second], (16,))
    assert not torch.isclose(noise[0], noise[1]).any()


@pytest.mark.slow
def test_no_two_of_200_000_items_share_their_noise() -> None:
    """Of keys with 32 bits, about five pairs would be equal."""
    noise = item_noise(0, [str(i) for i in range(200_000)], (4,))
    assert len(noise.unique(dim=0)) == 200_000


def test_item_noise_is_standard_normal() -> None:
    noise = item_noise(0, [str(i) for i in range(64)], (4, 32, 32)).double()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1) < 0.01
    assert abs((noise**3).mean()) < 0.03
    assert abs((noise**4).mean() - 3) < 0.06
    assert 4 < noise.abs().max() < 6
    quantiles = noise.flatten().quantile(torch.tensor([0.02275, 0.15866, 0.5, 0.84134, 0.97725]).double())
    assert torch.allclose(quantiles, torch.tensor([-2.0, -1, 0, 1, 2]).double(), atol=0.02)
    flat = noise.flatten(1)
    half = flat.shape[1] // 2
    pairs = torch.stack([flat[:, :half].flatten(), flat[:, half:].flatten()])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.01, "the two numbers of a Box-Muller pair are independent"
    assert torch.corrcoef(pairs.square())[0, 1].abs() < 0.01


def test_noise_is_finite_at_the_ends_of_its_random_integers() -> None:
    bits = torch.tensor([[0, 0], [2**24 - 1, 2**24 - 1]], dtype=torch.int32)
    normal = _normal(bits, (2,))
    assert normal.isfinite().all()
    assert normal[0, 0] == pytest.approx(math.sqrt(50 * math.log(2)), rel=1e-6)
    assert normal[1, 0] == pytest.approx(0, abs=1e-3)


def test_noise_of_an_item_never_changes() -> None:
    """A picture can be made again by newer versions and on other machines."""
    expected = torch.tensor([-1.1424093, -0.337389, -0.2087017, 0.1817447])
    assert torch.allclose(item_noise(0, ["a red cube"], (4,))[0], expected, atol=1e-6)
    noise = training_noise(0, 0, [0], (2,))
    expected = torch.tensor([0.7537333, 0.0308358, 0.890448, -0.8867483])
    assert torch.allclose(torch.cat([noise.time, noise.drop, noise.source[0]]), expected, atol=1e-6)


def test_keys_separate_their_parts_and_are_the_same_everywhere() -> None:
    assert key("ab", "c") != key("a", "bc")
    assert key("a", 1) == 6962120981034877120
    assert all(0 <= key("x", i) < 2**63 for i in range(100))
    assert torch.equal(torch.rand(3, generator=keyed_generator(1)), torch.rand(3, generator=keyed_generator(1)))


def test_noise_moves_as_a_whole() -> None:
    moved = training_noise(0, 0, [0], (2,)).to("meta")
    assert {moved.source.device.type, moved.time.device.type, moved.drop.device.type} == {"meta"}


def whole(seed: int, epoch: int, n: int) -> np.ndarray:
    return order(seed, epoch, n)[np.arange(n)]


def test_order_is_a_permutation_per_epoch_and_seed():
    orders = [whole(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for permutation in orders:
        assert sorted(permutation.tolist()) == list(range(1000))
    assert len({tuple(permutation.tolist()) for permutation in orders}) == 4


@pytest.mark.parametrize("kept", [SortedOrder(np.random.default_rng(0).permutation(10_000)), KeyedOrder(10_000, "x")])
def test_order_is_shuffled_and_can_be_inverted(kept: Order):
    permutation = kept[np.arange(10_000)]
    assert abs(np.corrcoef(permutation, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(permutation == np.arange(10_000)) < 0.01
    assert [kept.place_of(index) for index in permutation[:50].tolist()] == list(range(50))


def test_order_never_changes():
    """Runs are resumed by newer versions, which must go on in the same order."""
    assert whole(0, 0, 10).tolist() == [6, 5, 0, 7, 3, 2, 4, 9, 8, 1]
    large = order(0, 1, LARGEST_SORTED + 1)
    assert large[np.array([0, 1, LARGEST_SORTED])].tolist() == [427504, 428058, 127369]


@pytest.mark.slow
def test_items_of_the_size_of_imagenet_keep_the_order_that_they_have_always_had():
    permutation = whole(1, 2, LARGEST_SORTED)
    assert np.array_equal(
        permutation, np.argsort(np.random.Philox(key=key("order", 1, 2)).random_raw(LARGEST_SORTED), kind="stable")
    )


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_a_keyed_order_is_a_permutation_of_any_number_of_items(n: int, seed: int):
    assert np.array_equal(np.sort(KeyedOrder(n, seed)[np.arange(n)]), np.arange(n))


def test_a_keyed_order_is_as_uniform_as_sorted_random_numbers():
    """Neighbours of an epoch, and the same place of two epochs, fall into any pair of 16 intervals equally often."""
    n = 300_017
    first, second = (KeyedOrder(n, "many", epoch)[np.arange(n)] * 16 // n for epoch in (0, 1))
    for pairs in (first[:-1] * 16 + first[1:], first * 16 + second):
        assert scipy.stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-3


def test_the_order_of_a_billion_items_needs_no_memory_and_under_a_millisecond_a_step():
    permutation = order(0, 3, 10**9)
    places, times = np.arange(512 * 1024, 513 * 1024), []
    tracemalloc.start()
    for _ in range(20):
        start = time.process_time()
        indices = permutation[places]
        times.append(time.process_time() - start)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(np.unique(indices)) == 1024
    assert min(times) < 1e-3
