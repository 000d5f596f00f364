"""Keyed noise: a row follows from its key alone."""

import numpy as np
import pytest
import torch

from crossflow.core.noise import item_noise, key, keyed_generator, order, training_noise


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


def test_item_noise_follows_from_seed_and_id() -> None:
    whole = item_noise(5, ["a", "b", "c"], (2, 3))
    assert torch.equal(item_noise(5, ["c"], (2, 3))[0], whole[2])
    assert not torch.isclose(item_noise(6, ["c"], (2, 3))[0], whole[2]).any()
    assert not torch.isclose(whole[0], whole[1]).any()


def test_keys_tell_parts_apart_and_are_the_same_everywhere() -> None:
    assert key("ab", "c") != key("a", "bc")
    assert key("a", 1) == 6962120981034877120
    assert all(0 <= key("x", i) < 2**63 for i in range(100))
    assert torch.equal(torch.rand(3, generator=keyed_generator(1)), torch.rand(3, generator=keyed_generator(1)))


def test_noise_moves_as_a_whole() -> None:
    moved = training_noise(0, 0, [0], (2,)).to("meta")
    assert {moved.source.device.type, moved.time.device.type, moved.drop.device.type} == {"meta"}


def test_order_is_a_permutation_per_epoch_and_seed():
    orders = [order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for permutation in orders:
        assert sorted(permutation.tolist()) == list(range(1000))
    assert len({tuple(permutation.tolist()) for permutation in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1


def test_order_is_mixed():
    permutation = order(0, 0, 10_000)
    assert abs(np.corrcoef(permutation, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(permutation == np.arange(10_000)) < 0.01


def test_order_never_changes():
    """Runs are resumed by newer versions, which must go on in the same order."""
    assert order(0, 0, 10).tolist() == [6, 5, 0, 7, 3, 2, 4, 9, 8, 1]
