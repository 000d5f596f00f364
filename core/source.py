"""The source encoder: features of the source modality -> a posterior over latents of the target's shape.

A task supplies the trunk (features, mask) -> (B, 2, *latent). The variants of the ablation (CrossFlow Table 3) are
variational z0 = mu + exp(log_var/2) eps, deterministic z0 = E(x), noisy z0 = E(x) + sigma eps, and gaussian z0 = eps,
whose features are a condition of the backbone.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from crossflow.core.errors import unknown_name

SourceKind = Literal["variational", "deterministic", "noisy", "gaussian"]
# Prevents overflow in float16; the release does not clip, and no trained model comes near these bounds.
LOG_VAR_RANGE = (-20.0, 10.0)


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(log_var)), diagonal; a point if log_var is None. Both are shaped (B, *latent).

    >>> posterior = Posterior(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    >>> posterior.sample(noise=torch.full((2, 4, 8, 8), 0.5)).unique()
    tensor([1.5000])
    >>> posterior.kl()
    tensor([128., 128.])
    """

    mean: Tensor
    log_var: Tensor | None = None

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + exp(log_var / 2) eps, eps = `noise` or drawn from `generator`; the mean without log_var."""
        if self.log_var is None:
            return self.mean
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean.device)
        return self.mean + (self.log_var / 2).exp() * noise

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: (B, *latent)."""
        return self.mean

    def kl(self, form: str = "standard") -> Tensor:
        """The regulariser named `form` (losses.KL_FORMS), summed over the latent: (B,). Zero for a point."""
        from crossflow.core.losses import KL_FORMS

        if self.log_var is None:
            return self.mean.new_zeros(len(self.mean))
        return KL_FORMS.get(form)(self.mean, self.log_var)


class SourceEncoder(nn.Module):
    """Trunk and variational head: features of the source -> `Posterior`.

    trunk: module (features, mask) -> (B, 2, *latent), None for `gaussian`; only `variational` reads the second half.
    latent_shape: (C, H, W) or (N, C) of a `gaussian` source; otherwise the trunk determines the shape.
    noise_scale: sigma of the `noisy` variant, in units of the latent.
    Raises UserError for an unknown kind.
    """

    def __init__(
        self, trunk: nn.Module | None, kind: SourceKind, latent_shape: tuple[int, ...], noise_scale: float = 1.0
    ) -> None:
        super().__init__()
        if kind not in get_args(SourceKind):
            raise unknown_name("source kind", kind, get_args(SourceKind))
        assert (trunk is None) == (kind == "gaussian"), "every source but gaussian has a trunk"
        self.trunk = trunk
        self.kind = kind
        self.latent_shape = tuple(latent_shape)
        self.noise_scale = noise_scale

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Posterior:
        """features (B, ...), mask (B, N) bool for token features -> posterior over latents (B, *latent), float32."""
        if self.trunk is None:
            mean = torch.zeros(len(features), *self.latent_shape, device=features.device)
            return Posterior(mean, torch.zeros_like(mean))
        # (B, *latent) each; float32 because exp of log_var follows
        mean, second = self.trunk(features, mask).float().unbind(1)
        if self.kind == "variational":
            return Posterior(mean, second.clamp(*LOG_VAR_RANGE))
        if self.kind == "noisy":
            return Posterior(mean, torch.full_like(mean, 2 * math.log(self.noise_scale)))
        return Posterior(mean)
