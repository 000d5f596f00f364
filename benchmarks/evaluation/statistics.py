"""Statistics of the features of pictures: what the distances to real pictures need, computed once and kept.

Real pictures are those that a protocol names, or those behind a published file of statistics: an .npz with `mu` and
`sigma`, such as ADM's VIRTUAL_imagenet256_labeled.npz. N pictures, D width of the features, S size of the sample.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.benchmarks.evaluation.networks import FeatureNetwork
from crossflow.core.errors import UserError
from crossflow.core.files import read_metadata, read_tensors, write_tensors

SAMPLE = 10_000
"""Number of features kept for the kernel distance; the Frechet distance needs none of them."""
INCEPTION_WIDTH = 2048


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of the features of pictures, and a random sample (S, D) of the features.

    count: number of pictures, None if a published file does not record it; sample: empty if unknown; about: everything
    that the statistics depend on.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    sample: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D, the number of features."""
        return len(self.mean)

    def save(self, path: Path) -> None:
        """Writes a .safetensors file for `read_statistics`."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "sample": self.sample}
        about = json.dumps({"count": self.count, **self.about}, ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"statistics": about})

    def expect_network(self, network: FeatureNetwork) -> None:
        """Raises UserError unless these are features of `network`; published files hold features of Inception."""
        if "weights" in self.about:
            if self.about["weights"] != network.checksum:
                raise UserError(
                    f"The statistics of real pictures come from {self.about.get('network')}, not from the same weights "
                    f"of {network.words}."
                )
        elif not network.is_inception or self.width != INCEPTION_WIDTH:
            raise UserError(
                f"Published statistics are of Inception's {INCEPTION_WIDTH} features; these are {self.width} wide, and "
                f"the feature network is {network.words}. Compute statistics with crossflow statistics instead."
            )


class Accumulator:
    """Sums over features in float64, and a uniform random sample of at most `size` of them.

    The sample is a function of `seed` and the order of the pictures; batches do not change it.

    >>> accumulator = Accumulator()
    >>> accumulator.add(np.array([[1.0], [3.0]]))
    >>> statistics = accumulator.statistics()
    >>> float(statistics.mean[0]), float(statistics.covariance[0, 0])
    (2.0, 2.0)
    """

    def __init__(self, seed: int = 0, size: int = SAMPLE) -> None:
        self.count = 0
        self.size = size
        self._random = np.random.default_rng(seed)
        self._total = np.zeros(0)
        self._products = np.zeros((0, 0))
        self._features: list[np.ndarray] = []
        self._draws: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Adds the features (N, D) of further pictures."""
        wide = features.astype(np.float64)
        if self.count == 0:
            self._total, self._products = np.zeros(wide.shape[1]), np.zeros((wide.shape[1],) * 2)
        self._total += wide.sum(axis=0)
        self._products += wide.T @ wide
        self._features.append(features.astype(np.float32))
        self._draws.append(self._random.random(len(features)))
        self.count += len(features)
        if sum(map(len, self._draws)) > 2 * self.size:
            self._thin()

    def _thin(self) -> None:
        """Every picture has drawn a number; those with the smallest `size` of them stay, in their order."""
        features, draws = np.concatenate(self._features), np.concatenate(self._draws)
        kept = np.sort(np.argsort(draws, kind="stable")[: self.size])
        self._features, self._draws = [features[kept]], [draws[kept]]

    def statistics(self, about: Mapping[str, Any] | None = None) -> Statistics:
        """Mean, unbiased covariance and sample of all pictures. Raises UserError for fewer than two of them."""
        if self.count < 2:
            raise UserError(f"A distance needs at least two pictures on each side, got {self.count}.")
        self._thin()
        mean = self._total / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Statistics(mean, covariance, self.count, self._features[0], about or {})


def read_statistics(path: Path) -> Statistics:
    """Statistics written by `Statistics.save`, or published as an .npz of `mu` (D,) and `sigma` (D, D).

    Raises UserError for any other content; nothing in the file is executed.
    """
    if path.suffix == ".npz":
        return _read_published(path)
    try:
        about = json.loads(read_metadata(path)["statistics"])
        count = about.pop("count")
        tensors = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
        if "products" in tensors:
            return _from_sums(tensors, count, about)
        return Statistics(tensors["mean"], tensors["covariance"], count, tensors["sample"], about)
    except (UserError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not contain statistics of pictures ({error}); compute them with crossflow statistics."
        ) from error


def _from_sums(tensors: Mapping[str, np.ndarray], count: int, about: Mapping[str, Any]) -> Statistics:
    """Files of version 0.1 hold sums, and the first features instead of a random sample."""
    mean = tensors["total"] / count
    covariance = (tensors["products"] - count * np.outer(mean, mean)) / (count - 1)
    kept = tensors["kept"]
    return Statistics(mean, covariance, count, kept if len(kept) == count else kept[:0], about)


def _read_published(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} does not contain published statistics, that is, the arrays mu and sigma ({error})."
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu must be (D,) and sigma (D, D), got {mean.shape} and {covariance.shape} instead.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: mu and sigma contain values that are not finite.")
    about = {"network": "published Inception statistics", "file": path.name, "sha256": digest}
    return Statistics(mean, covariance, None, np.zeros((0, len(mean)), np.float32), about)
