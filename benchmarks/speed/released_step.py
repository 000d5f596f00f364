"""A training step and guided sampling in the released manner, on the networks of `released_networks`.

Samples come from one pickled file each, the optimizer is torch's AdamW with its defaults, the average of the weights is
a Python loop over them, and guidance makes two passes through the network.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.benchmarks.speed.released_files import read_released
from crossflow.benchmarks.speed.released_networks import ReleasedModel
from crossflow.benchmarks.speed.training import precision_name
from crossflow.core.batch import Batch
from crossflow.core.config import Config
from crossflow.core.noise import Noise
from crossflow.core.precision import autocast
from crossflow.core.training.optim import decay_groups

LAST_TIME = 1 - 1e-5
SIGMA_MIN = 1e-5


class ReleasedTraining:
    """Steps of the released training script for one process.

    config: the product's settings of losses, optimizer and average; scale: of the autoencoder's latents; files: one per
    sample, read over and over.
    """

    def __init__(
        self, model: ReleasedModel, config: Config, files: Sequence[Path], scale: Tensor, device: torch.device
    ) -> None:
        self.model, self.config, self.files, self.scale, self.device = model, config, files, scale, device
        train = config.train
        groups = decay_groups(model, train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)
        self.average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.generator = torch.Generator().manual_seed(0)
        self._next = self._batches()

    def _batches(self) -> Iterator[list[Path]]:
        size = self.config.train.batch_size
        while True:
            order = torch.randperm(len(self.files), generator=self.generator).repeat(1 + size // len(self.files))
            for start in range(0, len(order) - size + 1, size):
                yield [self.files[number] for number in order[start : start + size].tolist()]

    def step(self) -> None:
        """Reads a batch of files and makes one optimizer step."""
        batch, noise = self._read(next(self._next))
        self.optimizer.zero_grad()
        self.loss(batch, noise).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip, foreach=False)
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                self.average[name].mul_(self.config.train.ema).add_(weight, alpha=1 - self.config.train.ema)

    def _read(self, files: Sequence[Path]) -> tuple[Batch, Noise]:
        moments, features, mask = read_released(files, self.config.data.image_size)
        target = moments.sample(self.generator)
        draws = [torch.rand(len(target), generator=self.generator) for _ in range(2)]
        noise = Noise(torch.randn(target.shape, generator=self.generator), *draws)
        batch = Batch(features, target, mask).to(self.device)
        return Batch(batch.features, batch.target * self.scale, batch.mask), noise.to(self.device)

    def loss(self, batch: Batch, noise: Noise) -> Tensor:
        """L_FM + lambda L_KL of a batch whose unconditional samples have not been drawn."""
        assert batch.mask is not None
        with autocast(self.device, precision_name(self.config.train.precision)):
            mean, log_var = self.model.moments(batch.features, batch.mask)
            z0 = mean + (log_var / 2).exp() * noise.source
            unconditional, z1 = rotated(batch.target, noise.drop < self.config.guidance.drop)
            t = torch.sigmoid(torch.special.ndtri(noise.time.double().clamp(1e-7, 1 - 1e-7))).float()
            s = t[:, None, None, None]
            z_t = s * z1 + (1 - (1 - SIGMA_MIN) * s) * z0
            velocities = self.model.velocities(z_t, t, unconditional)
        flow = self._flow_loss(velocities, z1 - (1 - SIGMA_MIN) * z0)
        kl = -0.5 * (1 + log_var - (0.3 * mean).pow(6) - log_var.exp()).flatten(1).sum(1)
        return flow.mean() + self.config.loss.kl_weight * kl.mean()

    @staticmethod
    def _flow_loss(velocities: Sequence[Tensor], target: Tensor) -> Tensor:
        """(B,): coefficients from 1/4 to 1 in equal ratios, each with the error of one resolution."""
        total = target.new_zeros(len(target))
        for number, velocity in enumerate(velocities):
            ratio = target.shape[-1] // velocity.shape[-1]
            coarse = ratio * F.avg_pool2d(target, ratio) if ratio > 1 else target
            coefficient = 0.25 ** (1 - number / (len(velocities) - 1)) if len(velocities) > 1 else 1.0
            total = total + coefficient * (velocity.float() - coarse).square().flatten(1).mean(1)
        return total


def rotated(target: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The unconditional samples (B,) bool, and the targets with theirs exchanged one by one; a single one stays
    conditional.
    """
    places = [place for place, flag in enumerate(drawn.tolist()) if flag]
    if len(places) < 2:
        return torch.zeros_like(drawn), target
    exchanged = target.clone()
    for place, source in zip(places, [places[-1], *places[:-1]], strict=True):
        exchanged[place] = target[source]
    return drawn, exchanged


@torch.no_grad()
def released_samples(model: ReleasedModel, z0: Tensor, steps: int, guidance: float, precision: str) -> Tensor:
    """z0 (B, *latent) -> z1 by Euler steps on the released time grid; two passes for each guided velocity."""
    z, batch = z0, len(z0)
    with autocast(z0.device, precision):
        for time in torch.linspace(0, LAST_TIME, steps).tolist():
            t = torch.full((batch,), time, device=z.device)
            conditional = torch.zeros(batch, dtype=torch.bool, device=z.device)
            v = model.velocities(z, t, conditional)[-1].float()
            v_uncond = model.velocities(z, t, ~conditional)[-1].float()
            z = z + LAST_TIME / steps * (v_uncond + guidance * (v - v_uncond))
    return z
