"""What the source encoder of a run makes of held-out items: means, deviations and KL, value by value of the latent.

B items, D values of a latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossflow.core.model import CrossFlow
from crossflow.core.source import Posterior
from crossflow.data.dataset import Examples
from crossflow.tasks.base import Task


@dataclass(frozen=True)
class PosteriorNumbers:
    """The posteriors of some items, summarised over the D values of a latent.

    >>> mean = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> numbers = PosteriorNumbers.of(Posterior(mean, torch.zeros(2, 2)))
    >>> numbers.size, numbers.spread, numbers.deviation, numbers.active
    (0.7071067690849304, 0.5, 1.0, 0.5)
    """

    num_items: int
    size: float
    """Root mean square of the means."""
    largest: float
    """Largest absolute mean."""
    spread: float
    """Standard deviation of the means over items, averaged over values: how far items lie apart."""
    deviation: float | None
    """Standard deviation of the posterior, median over items and values; None for a point."""
    largest_deviation: float | None
    kl: float | None
    """KL from the standard normal in nats per value of the latent."""
    largest_kl: float | None
    """That of the value with the largest."""
    by_value: dict[str, tuple[float, float, float]]
    """mean, spread, deviation, kl -> that number of the values of the latent, at 5, 50 and 95 % of them."""
    active: float
    """Share of the values whose mean differs between items by more than a tenth of the posterior's deviation (of the
    means' size, for a point).
    """

    @classmethod
    def of(cls, posterior: Posterior) -> "PosteriorNumbers":
        """The numbers of at least two posteriors (B, *latent)."""
        mean = posterior.mean.flatten(1).float()
        assert len(mean) > 1, "the spread over items needs two of them"
        spread = mean.std(0, correction=0)
        size = mean.square().mean().sqrt()
        if posterior.log_var is None:
            scale, deviation, kl = size.expand_as(spread), None, None
        else:
            log_var = posterior.log_var.flatten(1).float()
            deviation, kl = (log_var / 2).exp(), _kl_by_value(mean, log_var)
            scale = deviation.mean(0)
        by_value = {"mean": mean.mean(0), "spread": spread}
        if deviation is not None and kl is not None:
            by_value |= {"deviation": deviation.mean(0), "kl": kl}
        return cls(
            num_items=len(mean),
            size=size.item(),
            largest=mean.abs().max().item(),
            spread=spread.mean().item(),
            deviation=None if deviation is None else deviation.median().item(),
            largest_deviation=None if deviation is None else deviation.max().item(),
            kl=None if kl is None else kl.mean().item(),
            largest_kl=None if kl is None else kl.max().item(),
            by_value={name: _quantiles(values) for name, values in by_value.items()},
            active=(spread > 0.1 * scale).float().mean().item(),
        )


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    """5, 50 and 95 % of values (D,), by counting: torch.quantile takes no more than 16 million."""
    ordered = values.sort().values
    low, middle, high = (ordered[round(share * (len(ordered) - 1))].item() for share in (0.05, 0.5, 0.95))
    return low, middle, high


def _kl_by_value(mean: Tensor, log_var: Tensor) -> Tensor:
    """The KL from N(0, 1) of each value of the latent, averaged over items: (D,), nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(0)


@torch.no_grad()
def measure_posterior(task: Task, model: CrossFlow, examples: Examples) -> PosteriorNumbers | None:
    """The posteriors of examples; None for a Gaussian source, which has no encoder, and for a single example."""
    if model.source_encoder.trunk is None or len(examples) < 2:
        return None
    batch = task.prepare(task.collate(examples.first(len(examples))))
    model.eval()
    return PosteriorNumbers.of(model.source_encoder(batch.features, batch.mask))
