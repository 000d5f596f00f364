"""Losses as functions of tensors.

L = L_FM + w_enc L_Enc + lambda L_KL (CrossFlow eq. 4). B batch, C channels, H W height width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from crossflow.core import pairs
from crossflow.core.distributed import gather_with_grad, rank
from crossflow.core.registry import Registry


def flow_matching_loss(prediction: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity, averaged per sample: (B,).

    prediction, velocity (B, *latent); weight (B, ...) broadcastable to them, 0 where the target is missing: the mean
    is over the other values, and 0 for a sample without any.
    """
    assert prediction.shape == velocity.shape, f"expected {tuple(velocity.shape)}, got {tuple(prediction.shape)}"
    error = (prediction.float() - velocity.float()).square()
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.float().expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-6)


def direction_loss(mean: Tensor, target: Tensor, weight: Tensor | None = None, *, whole: bool = False) -> Tensor:
    """1 - cosine of mean and target: over the channels of each position, averaged, or over the `whole` latent: (B,).

    mean, target (B, C, H, W) or (B, N, C); weight as for `flow_matching_loss`: positions without a target do not count.
    """
    assert mean.shape == target.shape, f"expected {tuple(target.shape)}, got {tuple(mean.shape)}"
    a, b = mean.float(), target.float()
    there = torch.ones_like(b) if weight is None else weight.float().expand_as(b)
    if whole:
        return 1 - F.cosine_similarity((a * there).flatten(1), (b * there).flatten(1), dim=1)
    channels = 1 if b.ndim == 4 else -1
    distance = 1 - F.cosine_similarity(a, b, dim=channels)  # (B, H, W) or (B, N)
    there = there.mean(channels)
    return (distance * there).flatten(1).sum(1) / there.flatten(1).sum(1).clamp(min=1e-6)


def multi_resolution_loss(
    predictions: list[Tensor], velocity: Tensor, coefficients: list[float], weight: Tensor | None = None
) -> Tensor:
    """Sum over stages, coarse to fine, of coefficient x mean squared error: (B,).

    The target of a stage K times coarser is K times the K x K average of the velocity (the DiMR loss as released), with
    a weight the average over the values present.
    """
    assert len(predictions) == len(coefficients), "one coefficient per stage"
    total = velocity.new_zeros(len(velocity), dtype=torch.float32)
    for prediction, coefficient in zip(predictions, coefficients, strict=True):
        k = velocity.shape[-1] // prediction.shape[-1] if velocity.ndim == 4 else 1
        target, stage_weight = (velocity, weight) if k == 1 else _coarser(velocity, weight, k)
        total = total + coefficient * flow_matching_loss(prediction, target, stage_weight)
    return total


def stage_coefficients(num_stages: int) -> list[float]:
    """Coefficients of `multi_resolution_loss`, coarse to fine: from 1/4 to 1 in equal ratios.

    (1/4, 1) for the two stages of the released 256 px models, (1/4, 1/2, 1) for the three at 512 px, 1 for one stage.
    """
    return [0.25 ** (1 - i / (num_stages - 1)) for i in range(num_stages)] if num_stages > 1 else [1.0]


def _coarser(velocity: Tensor, weight: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """k times the (weighted) k x k average of the velocity (B, C, H, W), and the average of the weight."""
    if weight is None:
        return k * F.avg_pool2d(velocity, k), None
    weight = weight.float().expand_as(velocity)
    pooled = F.avg_pool2d(weight, k)
    return k * F.avg_pool2d(weight * velocity, k) / pooled.clamp(min=1e-6), pooled


KL_FORMS: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("KL form")


@KL_FORMS.register("standard")
def kl_standard(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, I)), summed over the latent: (B,)."""
    return -0.5 * (1 + log_var - mean.square() - log_var.exp()).flatten(1).sum(1)


@KL_FORMS.register("released")
def kl_released(mean: Tensor, log_var: Tensor) -> Tensor:
    """-1/2 sum(1 + log_var - (0.3 mean)^6 - exp(log_var)): (B,).

    The mean is nearly free inside |mean| < 3, the variance held at 1.
    """
    return -0.5 * (1 + log_var - (0.3 * mean).pow(6) - log_var.exp()).flatten(1).sum(1)


@KL_FORMS.register("variance")
def kl_variance(mean: Tensor, log_var: Tensor) -> Tensor:
    """-1/2 sum(1 + log_var - exp(log_var)): (B,). The mean is free (CSFM, arXiv 2602.05951)."""
    return -0.5 * (1 + log_var - log_var.exp()).flatten(1).sum(1)


def _normalised(x: Tensor) -> Tensor:
    return F.normalize(x.float().flatten(1), dim=1)


def _logits(a: Tensor, b: Tensor, log_temperature: Tensor) -> Tensor:
    """exp(log_temperature) a b^T in float32 even under autocast: scaled by 100, bfloat16 would be off by up to 0.4."""
    with torch.autocast(a.device.type, enabled=False):
        return log_temperature.float().exp() * a @ b.T


def clip_contrastive_loss(z0: Tensor, target: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy of the similarities of flattened, L2-normalised z0 and target, over all ranks: scalar.

    z0, target (B, ...) of the same number of values; logits are similarities times exp(log_temperature). Negatives come
    from every rank, with gradients (Radford et al. 2021; CrossFlow section 4.2); those of many ranks in chunks.
    """
    a, b = _normalised(z0), _normalised(target)
    if pairs.are_many(a):
        none = torch.zeros_like(log_temperature)
        rows = [pairs.sums(*pair, log_temperature, none, "softmax") for pair in ((a, b), (b, a))]
        return (sum(rows) / 2 - log_temperature.float().exp() * (a * b).sum(1)).mean()
    all_a, all_b = gather_with_grad(a), gather_with_grad(b)
    here = torch.arange(len(a), device=a.device) + rank() * len(a)
    return (
        F.cross_entropy(_logits(a, all_b, log_temperature), here)
        + F.cross_entropy(_logits(b, all_a, log_temperature), here)
    ) / 2


def sigmoid_contrastive_loss(z0: Tensor, target: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    """The pairwise sigmoid loss (SigLIP, Zhai et al. 2023) over all ranks, averaged per sample: scalar."""
    a, b = _normalised(z0), _normalised(target)
    if pairs.are_many(a):
        own = log_temperature.float().exp() * (a * b).sum(1) + bias
        # -logsigmoid(s) of a matching pair is softplus(s) - s, and of any other pair softplus(s).
        return (pairs.sums(a, b, log_temperature, bias, "sigmoid") - own).mean()
    all_b = gather_with_grad(b)
    here = torch.arange(len(a), device=a.device) + rank() * len(a)
    # F.one_hot would read the largest index back from the device.
    sign = torch.where(here[:, None] == torch.arange(len(all_b), device=a.device), 1.0, -1.0)
    logits = _logits(a, all_b, log_temperature) + bias
    return -F.logsigmoid(sign * logits).sum(1).mean()


def reconstruction_loss(reconstruction: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error to the features, averaged over the values present: scalar; mask (B, N) bool for tokens."""
    assert reconstruction.shape == features.shape, (
        f"expected {tuple(features.shape)}, got {tuple(reconstruction.shape)}"
    )
    error = (reconstruction.float() - features.float()).square()
    if mask is None:
        return error.mean()
    weight = mask.reshape(*mask.shape, *[1] * (error.ndim - mask.ndim)).expand_as(error).float()
    return (error * weight).sum() / weight.sum().clamp(min=1)
