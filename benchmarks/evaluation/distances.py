"""Distances between the feature distributions of generated and real pictures: FID, KID and IS.

FID = |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of the features' means and covariances (Heusel et al. 2017);
KID = unbiased squared maximum mean discrepancy of a cubic kernel (Binkowski et al. 2018);
IS = exp of the mean divergence of p(class | picture) from p(class) (Salimans et al. 2016).
With a feature network other than Inception the same numbers are called frechet_distance, kernel_distance and
class_score, since they are not FID, KID and IS. N pictures, D width of the features.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from crossflow.benchmarks.evaluation.protocol import DISTANCES
from crossflow.benchmarks.evaluation.statistics import Accumulator, Statistics
from crossflow.core.errors import UserError


def distances(
    numbers: Sequence[str],
    batches: Iterable[dict[str, np.ndarray]],
    real: Statistics,
    is_inception: bool,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """The requested distances of generated pictures by name, and notes about them.

    numbers: of "fid", "kid" and "is"; batches: {"features" (N, D), "logits" (N, K) if the network classifies}.

    Raises UserError for too few pictures, for features of another network, and for "kid" without features of real
    pictures.
    """
    accumulator, logits = Accumulator(seed), []
    for batch in batches:
        if len(batch["features"]):
            accumulator.add(batch["features"])
            if "is" in numbers and "logits" in batch:
                logits.append(torch.from_numpy(batch["logits"]))
    generated = accumulator.statistics()
    if generated.width != real.width:
        raise UserError(
            f"The statistics of the real pictures are {real.width} wide, these features {generated.width}: they come "
            "from different networks."
        )
    values: dict[str, float] = {}
    notes = []
    for number in numbers:
        by_inception, by_another = DISTANCES[number]
        name = by_inception if is_inception else by_another
        if number == "fid":
            values[name] = frechet_distance(generated, real)
        elif number == "kid":
            values[name] = kernel_distance(generated.sample, real.sample, seed)
        elif logits:
            values[name] = class_score(torch.cat(logits), seed)
        else:
            notes.append(f"{name} is left out: the feature network does not classify")
    fewest = min(count for count in (generated.count, real.count) if count is not None)
    if "fid" in numbers and fewest <= real.width:
        notes.append(
            f"{fewest} pictures are fewer than the {real.width} features: the Frechet distance is far too high and "
            "comparable only with that of equally many pictures"
        )
    return values, notes


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) in float64."""
    # The eigenvalues of C1 C2 are real and not negative, but for rounding.
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)).real
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots.sum())


def kernel_distance(generated: np.ndarray, real: np.ndarray, seed: int) -> float:
    """Mean of the unbiased MMD^2 over 100 random subsets of at most 1,000 features (N, D), by torchmetrics.

    Raises UserError without features of real pictures, of which published statistics have none.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    if len(real) < 2:
        raise UserError(
            "The kernel distance needs features of real pictures, and this file of statistics has none. Compute the "
            "statistics with crossflow statistics, or use a protocol without kid."
        )
    size = min(1000, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_identity(real.shape[1]), subset_size=size, sync_on_compute=False)
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(generated), real=False)
        return float(metric.compute()[0])


def class_score(logits: torch.Tensor, seed: int) -> float:
    """exp of the mean divergence of p(class | picture) from p(class) for logits (N, K), by torchmetrics.

    The mean over 10 random parts, as published.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = InceptionScore(feature=_identity(logits.shape[1]), sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])


def _identity(width: int) -> torch.nn.Module:
    """In place of a feature network, for torchmetrics: the features have been computed already.

    Metrics never wait for other ranks (sync_on_compute=False): rank 0 computes alone.
    """
    network = torch.nn.Identity()
    network.num_features = width  # type: ignore[assignment]
    return network
