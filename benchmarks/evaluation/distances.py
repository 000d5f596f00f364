"""Distances between the distributions of features of drawn and of real pictures: FID, KID, IS by torchmetrics.

Statistics are sums over features, and pictures pass one batch at a time. Rank 0 computes alone (sync_on_compute=False):
torchmetrics would wait for the other ranks, which have left by then. With another network than Inception the same
numbers are called frechet_distance, kernel_distance and class_score, since they are not FID, KID and IS.
References: Heusel et al. 2017 (FID); Binkowski et al. 2018 (KID); Salimans et al. 2016 (IS).

N pictures, D width of the features.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossflow.benchmarks.evaluation.networks import FeatureNetwork, feature_network
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core import distributed
from crossflow.core.errors import UserError
from crossflow.core.files import read_metadata, read_tensors, user_cache, write_tensors
from crossflow.core.progress import Progress
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.readers import open_reader, require, with_options
from crossflow.data.resize import center_crop_resize

KEPT = 10_000
"""Features of real pictures that are kept for KID; FID needs none of them."""
OTHERS = {"fid": "frechet_distance", "kid": "kernel_distance", "is": "class_score"}
"""What the numbers are called when another network than Inception measured them."""


@dataclass
class Statistics:
    """Sums over features in float64: count, total (D,), products (D, D); the first features themselves for KID."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    products: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    kept: list[np.ndarray] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, features: np.ndarray) -> None:
        """features (N, D)."""
        wide = features.astype(np.float64)
        if self.count == 0:
            self.total, self.products = np.zeros(wide.shape[1]), np.zeros((wide.shape[1],) * 2)
        self.total += wide.sum(axis=0)
        self.products += wide.T @ wide
        room = KEPT - sum(map(len, self.kept))
        if room > 0:
            self.kept.append(features[:room].astype(np.float32))
        self.count += len(features)

    def features(self) -> np.ndarray:
        return np.concatenate(self.kept) if self.kept else np.zeros((0, len(self.total)), np.float32)

    def save(self, path: Path) -> None:
        """As .safetensors, whole or not at all; `read_statistics` reads it."""
        tensors = {"total": self.total, "products": self.products, "kept": self.features()}
        about = {"count": self.count, **self.about}
        write_tensors(path, tensors, {"statistics": json.dumps(about, ensure_ascii=False)})


def read_statistics(path: Path) -> Statistics:
    """What `Statistics.save` wrote. Raises UserError when the file holds something else."""
    try:
        about = json.loads(read_metadata(path)["statistics"])
        tensors = read_tensors(path)
        total, products, kept = (tensors[name].numpy() for name in ("total", "products", "kept"))
    except (UserError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no statistics of pictures ({error}); make them with crossflow statistics."
        ) from error
    return Statistics(about.pop("count"), total, products, [kept], about)


def reference(
    protocol: Protocol, examples: Examples, network: FeatureNetwork, progress: Progress | None = None
) -> Statistics:
    """Statistics of the real pictures of `examples`, from the user's cache when they are there.

    Several processes share the work; each must call it, and all get the result.
    """
    about = described(protocol, examples, network)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{protocol.name}-{key[:24]}.safetensors"
    if not distributed.on_main(path.is_file):
        stride = 64
        parts = [range(start, min(start + stride, len(examples))) for start in range(0, len(examples), stride)]

        def work(part: range) -> np.ndarray:
            pictures = [real_picture(protocol, item.image) for item in examples.items_at(part)]
            usable = [picture for picture in pictures if picture is not None]
            return network(usable)["features"] if usable else np.zeros((0, 0), np.float32)

        found = Statistics(about=about)
        for part, features in distributed.shared(parts, work):
            if len(features):
                found.add(features)
            if progress is not None:
                progress(part.stop, len(examples))
        distributed.on_main(lambda: _keep(found, path))
    return read_statistics(path)


def _keep(found: Statistics, path: Path) -> str:
    if found.count < 2:
        raise UserError(
            f"{found.about['spec']} ({found.about['split']}) has {found.count} usable pictures; a distance needs two."
        )
    found.save(path)
    return ""


def statistics_of(protocol: Protocol, spec: str, device: torch.device, progress: Progress | None = None) -> Statistics:
    """Statistics of the pictures at `spec`, without a run."""
    if protocol.distribution is None:
        raise UserError(f"The protocol {protocol.name} has no distance, so it needs no statistics of real pictures.")
    whole = protocol.distribution.reference == "split"
    spec = with_options(spec, protocol.reader)
    reader = open_reader(spec, protocol.split, limit=None if whole else protocol.choose)
    examples = Examples(require(reader, {"image"}, protocol.task), _unused, seed=0, cache=False)
    return reference(protocol, examples, feature_network(protocol.networks["features"]).to(device), progress)


def _unused(item: Item, generator: np.random.Generator) -> Item:
    return item


def described(protocol: Protocol, examples: Examples, network: FeatureNetwork) -> dict[str, Any]:
    """What statistics of real pictures depend on."""
    rules = protocol.distribution
    assert rules is not None
    return {
        "data": examples.reader.fingerprint(),
        "spec": examples.reader.spec,
        "split": examples.reader.split,
        "side": rules.size,
        "smaller": rules.smaller if rules.size else "left out",
        "network": network.words,
        "weights": network.checksum,
    }


def real_picture(protocol: Protocol, image: np.ndarray | None) -> np.ndarray | None:
    """A real picture as the protocol prepares it; None when it is too small."""
    rules = protocol.distribution
    assert rules is not None
    assert image is not None
    if rules.size is None:
        return image
    if rules.smaller == "left out" and min(image.shape[:2]) < rules.size:
        return None
    return center_crop_resize(image, rules.size)


def cache_folder() -> Path:
    return user_cache() / "statistics"


def distances(
    numbers: Sequence[str],
    batches: Iterable[dict[str, np.ndarray]],
    real: Statistics,
    is_inception: bool,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """The asked numbers for drawn pictures whose features and logits come in batches, and notes about them.

    Raises UserError when there are too few pictures, or the networks differ.
    """
    drawn, logits = Statistics(), []
    for batch in batches:
        if len(batch["features"]):
            drawn.add(batch["features"])
            if "is" in numbers and "logits" in batch:
                logits.append(torch.from_numpy(batch["logits"]))
    if drawn.count < 2 or real.count < 2:
        raise UserError(f"A distance needs two pictures at least: {drawn.count} drawn, {real.count} real.")
    if drawn.total.shape != real.total.shape:
        raise UserError(
            f"The statistics of the real pictures are {len(real.total)} wide and these features {len(drawn.total)}: "
            "they come from another network."
        )
    found: dict[str, float] = {}
    notes = []
    for number in numbers:
        name = number if is_inception else OTHERS[number]
        if number == "fid":
            found[name] = frechet_distance(drawn, real)
        elif number == "kid":
            found[name] = kernel_distance(drawn, real, seed)
        elif logits:
            found[name] = class_score(torch.cat(logits), seed)
        else:
            notes.append(f"{name} is left out: the feature network does not classify")
    fewest = min(drawn.count, real.count)
    if "fid" in numbers and fewest <= len(drawn.total):
        notes.append(
            f"{fewest} pictures are fewer than the {len(drawn.total)} features: the Frechet distance is far too high "
            "and compares only with one on as many pictures"
        )
    return found, notes


def _passing(width: int) -> torch.nn.Module:
    network = torch.nn.Identity()
    network.num_features = width  # type: ignore[assignment]
    return network


def frechet_distance(drawn: Statistics, real: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) by torchmetrics, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_passing(len(real.total)), sync_on_compute=False)
    for prefix, one in (("real", real), ("fake", drawn)):
        setattr(metric, f"{prefix}_features_sum", torch.from_numpy(one.total))
        setattr(metric, f"{prefix}_features_cov_sum", torch.from_numpy(one.products))
        setattr(metric, f"{prefix}_features_num_samples", torch.tensor(one.count))
    metric.orig_dtype = torch.float64
    metric._update_count = 1  # or it warns that nothing came
    return float(metric.compute())


def kernel_distance(drawn: Statistics, real: Statistics, seed: int) -> float:
    """Mean over 100 subsets of at most 1,000 of the polynomial MMD^2, by torchmetrics; seeded."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(real.features()), len(drawn.features()))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_passing(len(real.total)), subset_size=size, sync_on_compute=False)
        metric.update(torch.from_numpy(real.features()), real=True)
        metric.update(torch.from_numpy(drawn.features()), real=False)
        return float(metric.compute()[0])


def class_score(logits: torch.Tensor, seed: int) -> float:
    """exp of the mean divergence of p(class | picture) from p(class), mean of 10 parts, by torchmetrics; seeded."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = InceptionScore(feature=_passing(logits.shape[1]), sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])
