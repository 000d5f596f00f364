"""Losses against torch.distributions, closed forms, naive loops and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from crossflow.core import losses
from crossflow.core.losses import (
    KL_FORMS,
    clip_contrastive_loss,
    direction_loss,
    flow_matching_loss,
    kl_released,
    kl_standard,
    kl_variance,
    multi_resolution_loss,
    reconstruction_loss,
    sigmoid_contrastive_loss,
    stage_coefficients,
)


@pytest.fixture
def posterior() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(2, 5, 4, 3, 3, generator=generator)
    return mean, log_var


def test_standard_kl_equals_torch_distributions(posterior: tuple[Tensor, Tensor]) -> None:
    mean, log_var = posterior
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_standard(mean, log_var), expected, rtol=1e-5)


def test_released_kl_has_its_closed_form(posterior: tuple[Tensor, Tensor]) -> None:
    mean, log_var = posterior
    expected = [
        sum(-0.5 * (1 + lv - (0.3 * m) ** 6 - math.exp(lv)) for m, lv in zip(ms, lvs, strict=True))
        for ms, lvs in zip(mean.flatten(1).tolist(), log_var.flatten(1).tolist(), strict=True)
    ]
    assert torch.allclose(kl_released(mean, log_var), torch.tensor(expected), rtol=1e-4)


def test_released_kl_leaves_the_mean_nearly_free_inside_three() -> None:
    inside, outside = kl_released(torch.tensor([[1.0], [6.0]]), torch.zeros(2, 1))
    assert inside == pytest.approx(0.3**6 / 2, rel=1e-4)
    assert outside == pytest.approx(1.8**6 / 2, rel=1e-4)


def test_variance_form_is_the_standard_form_at_mean_zero(posterior: tuple[Tensor, Tensor]) -> None:
    mean, log_var = posterior
    assert torch.allclose(kl_variance(mean, log_var), kl_standard(torch.zeros_like(mean), log_var))
    assert torch.equal(kl_variance(mean, log_var), kl_variance(mean + 5, log_var))


@pytest.mark.parametrize("form", KL_FORMS.names())
def test_kl_forms_are_least_at_the_standard_normal(form: str, posterior: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(KL_FORMS.get(form)(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))
    assert (KL_FORMS.get(form)(*posterior) > 0).all()


def test_flow_matching_loss_is_the_mean_square_of_each_sample() -> None:
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    velocity = torch.tensor([[[0.0, 4.0]], [[3.0, 0.0]]])
    assert flow_matching_loss(prediction, velocity).tolist() == [2.5, 4.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float16])
def test_weights_mask_missing_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    prediction, velocity = torch.randn(2, 3, 2, 4, 4)
    there = torch.rand(3, 1, 4, 4) < 0.5
    there[2] = False
    loss = flow_matching_loss(prediction, velocity, there.to(dtype))
    changed = torch.where(there, velocity, 1e3)
    assert torch.equal(loss, flow_matching_loss(prediction, changed, there.to(dtype)))
    for b in range(2):
        error = (prediction[b] - velocity[b]).square()[there[b].expand(2, 4, 4)]
        assert loss[b] == pytest.approx(error.mean().item(), rel=1e-5)
    assert loss[2] == 0, "nothing there"


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(AssertionError):
        flow_matching_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(AssertionError):
        reconstruction_loss(torch.zeros(2, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("whole", [False, True])
def test_direction_loss_is_exact_and_blind_to_length(whole: bool) -> None:
    along, across = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 5.0]).view(1, 2, 1, 1)
    for mean, expected in ((0.1 * along, 0.0), (across, 1.0), (-along, 2.0), (along + 3 / 5 * across, 1 - 0.5**0.5)):
        assert direction_loss(mean, along, whole=whole).item() == pytest.approx(expected, abs=1e-6)


def test_direction_loss_of_positions_and_of_the_whole_equals_a_naive_loop() -> None:
    torch.manual_seed(0)
    mean, target = torch.randn(2, 3, 4, 2, 2)
    there = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    places = [(0, 0), (0, 1), (1, 0)]
    for b in range(3):
        parts = [1 - _similarity(mean[b, :, i, j], target[b, :, i, j]) for i, j in places]
        assert direction_loss(mean, target, there)[b] == pytest.approx(sum(parts) / 3, rel=1e-5)
        whole = 1 - _similarity(mean[b] * there[0], target[b] * there[0])
        assert direction_loss(mean, target, there, whole=True)[b] == pytest.approx(whole, rel=1e-5)
    tokens = mean.flatten(2).transpose(1, 2), target.flatten(2).transpose(1, 2)  # (B, N, C) as well
    assert torch.allclose(direction_loss(*tokens), direction_loss(mean, target), atol=1e-6)


def test_multi_resolution_loss_by_hand() -> None:
    # One sample, one channel; 2 x 2 average of the velocity is 2.5, the coarse target twice that: 5.
    velocity = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    coarse, fine = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 2, 2)
    loss = multi_resolution_loss([coarse, fine], velocity, [0.25, 1.0])
    assert loss.tolist() == [0.25 * (5 - 3) ** 2 + (1 + 4 + 9 + 16) / 4]


def test_multi_resolution_target_is_k_times_the_average() -> None:
    velocity = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stages = [4 * F.avg_pool2d(velocity, 4), 2 * F.avg_pool2d(velocity, 2), velocity]
    assert multi_resolution_loss(stages, velocity, [0.25, 0.5, 1.0]).abs().max() < 1e-10


def test_multi_resolution_loss_of_one_stage_is_the_plain_loss_also_for_tokens() -> None:
    prediction, velocity = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        multi_resolution_loss([prediction], velocity, [1.0]), flow_matching_loss(prediction, velocity)
    )


def test_missing_values_reach_no_stage_of_a_multi_resolution_loss() -> None:
    torch.manual_seed(0)
    velocity, fine, coarse = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 2, 2)
    there = torch.rand(2, 1, 4, 4) < 0.6
    first, second = (
        multi_resolution_loss([coarse, fine], v, [0.25, 1.0], there)
        for v in (velocity, torch.where(there, velocity, 50.0))
    )
    assert torch.allclose(first, second)
    # what is there is constant, so its average over any part of a square is that constant
    constant = torch.where(there, 3.0, -100.0)
    loss = multi_resolution_loss(
        [torch.full_like(coarse, 6.0), torch.full_like(fine, 3.0)], constant, [0.25, 1.0], there
    )
    assert loss.abs().max() < 1e-9


@pytest.mark.parametrize(("num_stages", "right"), [(1, [1.0]), (2, [0.25, 1.0]), (3, [0.25, 0.5, 1.0])])
def test_coefficients_are_the_released_ones(num_stages: int, right: list[float]) -> None:
    assert stage_coefficients(num_stages) == pytest.approx(right)


def test_one_coefficient_per_stage() -> None:
    with pytest.raises(AssertionError, match="one coefficient per stage"):
        multi_resolution_loss([torch.zeros(1, 1, 2, 2)], torch.zeros(1, 1, 2, 2), [0.25, 1.0])


def _similarity(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 3, 3, generator=generator), torch.randn(6, 18, generator=generator)


def test_contrastive_loss_equals_a_naive_loop(pairs: tuple[Tensor, Tensor]) -> None:
    z0, target = pairs
    scale, total, n = 10.0, 0.0, len(z0)
    for i in range(n):
        rows = [math.exp(scale * _similarity(z0[i], target[j])) for j in range(n)]
        columns = [math.exp(scale * _similarity(z0[j], target[i])) for j in range(n)]
        total -= (math.log(rows[i] / sum(rows)) + math.log(columns[i] / sum(columns))) / (2 * n)
    assert clip_contrastive_loss(z0, target, torch.tensor(scale).log()).item() == pytest.approx(total, rel=1e-5)


def test_sigmoid_loss_equals_a_naive_loop(pairs: tuple[Tensor, Tensor]) -> None:
    z0, target = pairs
    scale, bias, total, n = 5.0, -2.0, 0.0, len(z0)
    for i in range(n):
        for j in range(n):
            sign = 1 if i == j else -1
            total += math.log(1 + math.exp(-sign * (scale * _similarity(z0[i], target[j]) + bias))) / n
    loss = sigmoid_contrastive_loss(z0, target, torch.tensor(scale).log(), torch.tensor(bias))
    assert loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_contrastive_losses_ignore_length_and_fall_when_pairs_agree(name: str, pairs: tuple[Tensor, Tensor]) -> None:
    def loss(z0: Tensor, target: Tensor) -> float:
        scale = torch.tensor(10.0).log()
        if name == "clip":
            return clip_contrastive_loss(z0, target, scale).item()
        return sigmoid_contrastive_loss(z0, target, scale, torch.tensor(-5.0)).item()

    z0, target = pairs
    assert loss(3 * z0, 0.1 * target) == pytest.approx(loss(z0, target), rel=1e-4)
    assert loss(z0, z0) < loss(z0, target) < loss(z0, -z0)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_contrastive_logits_are_float32_under_autocast(name: str, pairs: tuple[Tensor, Tensor]) -> None:
    z0, target = pairs[0], pairs[0].flatten(1) + 2 * pairs[1]
    log_temperature = torch.tensor(100.0).log()

    def loss() -> float:
        if name == "clip":
            return clip_contrastive_loss(z0, target, log_temperature).item()
        return sigmoid_contrastive_loss(z0, target, log_temperature, torch.tensor(-90.0)).item()

    expected = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_loss_ignores_masked_values() -> None:
    features = torch.zeros(2, 3, 2)
    reconstruction = torch.tensor([[[1.0, 1.0], [9.0, 9.0], [9.0, 9.0]], [[2.0, 2.0], [3.0, 3.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert reconstruction_loss(reconstruction, features, mask).item() == pytest.approx((1 + 4 + 9) / 3)
    assert reconstruction_loss(reconstruction, features).item() == pytest.approx((1 + 4 + 9 + 3 * 81) / 6)


@pytest.mark.parametrize("kind", ["clip", "sigmoid"])
def test_contrastive_losses_of_two_ranks_average_to_that_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, pairs: tuple[Tensor, Tensor], kind: str
) -> None:
    scale = torch.tensor(10.0).log()

    def loss(z0: Tensor, target: Tensor) -> Tensor:
        if kind == "clip":
            return clip_contrastive_loss(z0, target, scale)
        return sigmoid_contrastive_loss(z0, target, scale, torch.tensor(-2.0))

    whole = loss(*pairs)
    normalised = [F.normalize(part.flatten(1), dim=1) for part in pairs]
    values = []
    for rank in (0, 1):
        rows = slice(3 * rank, 3 * rank + 3)
        everywhere = {tuple(part[rows].flatten().tolist()): part for part in normalised}
        monkeypatch.setattr(losses, "gather_with_grad", lambda x, known=everywhere: known[tuple(x.flatten().tolist())])
        monkeypatch.setattr(losses, "rank", lambda rank=rank: rank)
        values.append(loss(pairs[0][rows], pairs[1][rows]))
    assert torch.allclose(sum(values) / 2, whole, rtol=1e-5)
