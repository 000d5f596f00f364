"""The real pictures that generated ones are compared with: prepared as a protocol says, reduced to statistics, cached.

Generated pictures go through the same `prepare`, so that both sides are resized alike.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossflow.benchmarks.evaluation.feature_networks import FeatureNetwork, feature_network
from crossflow.benchmarks.evaluation.protocol import DistributionRules, Protocol
from crossflow.benchmarks.evaluation.statistics import Accumulator, Statistics, read_statistics
from crossflow.core import distributed
from crossflow.core.errors import UserError
from crossflow.core.files import user_cache
from crossflow.core.progress import Progress
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.readers import open_reader, require, with_options
from crossflow.data.resize import center_crop_resize

STRIDE = 64
"""Pictures that a process works on at a time."""


def prepare(rules: DistributionRules, picture: np.ndarray) -> np.ndarray | None:
    """A picture uint8 (H, W, 3) as the feature network takes it; None if the rules leave it out as too small."""
    if rules.size is None:
        return picture
    if rules.smaller == "left out" and min(picture.shape[:2]) < rules.size:
        return None
    return center_crop_resize(picture, rules.size)


def reference(
    protocol: Protocol, examples: Examples, network: FeatureNetwork, progress: Progress | None = None
) -> Statistics:
    """Statistics of the real pictures of `examples`, from the user's cache if possible.

    Several processes share the work: each must call this, and each gets the result. Raises UserError for fewer than
    two usable pictures.
    """
    rules = protocol.distribution
    assert rules is not None
    about = description(rules, examples, network)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{protocol.name}-{key[:24]}.safetensors"
    if distributed.on_main(path.is_file):
        return read_statistics(path)
    accumulator = Accumulator()
    parts = [range(start, min(start + STRIDE, len(examples))) for start in range(0, len(examples), STRIDE)]

    def features_of(part: range) -> np.ndarray:
        pictures = [prepare(rules, item.image) for item in examples.items_at(part) if item.image is not None]
        usable = [picture for picture in pictures if picture is not None]
        return network(usable)["features"] if usable else np.zeros((0, 0), np.float32)

    for part, features in distributed.shared(parts, features_of):
        if len(features):
            accumulator.add(features)
        if progress is not None:
            progress(part.stop, len(examples))
    distributed.on_main(lambda: accumulator.statistics(about).save(path))
    return read_statistics(path)


def statistics_of(protocol: Protocol, spec: str, device: torch.device, progress: Progress | None = None) -> Statistics:
    """Statistics of the real pictures at `spec`, without a run; the split is the one that the protocol compares with.

    Raises UserError for a protocol without a distance.
    """
    rules = protocol.distribution
    if rules is None:
        raise UserError(f"The protocol {protocol.name} has no distance, so it needs no statistics of real pictures.")
    split = "train" if rules.reference == "train" else protocol.split
    limit = protocol.choose if rules.reference == "items" else None
    reader = open_reader(with_options(spec, protocol.reader), split, limit=limit)
    examples = Examples(require(reader, {"image"}, protocol.task), _unchanged, seed=0, cache=False)
    return reference(protocol, examples, feature_network(protocol.networks["features"]).to(device), progress)


def _unchanged(item: Item, generator: np.random.Generator) -> Item:
    return item


def description(rules: DistributionRules, examples: Examples, network: FeatureNetwork) -> dict[str, Any]:
    """Everything that the statistics of real pictures depend on."""
    return {
        "data": examples.reader.fingerprint(),
        "spec": examples.reader.spec,
        "split": examples.reader.split,
        "side": rules.size,
        "smaller": rules.smaller,
        "network": network.words,
        "weights": network.checksum,
        "sample": "random",
    }


def cache_folder() -> Path:
    """Where statistics are kept between runs."""
    return user_cache() / "statistics"
