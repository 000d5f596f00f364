"""Pieces of several inputs share batches by shape, and outputs keep the order of the inputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crossflow.core.batch import Source
from crossflow.core.config import SampleConfig
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Pieces


class Doubling:
    """Inputs are lists of arrays, their pieces; a piece's output is its first value."""

    config = SimpleNamespace(sample=SampleConfig(batch_size=2))

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []

    def to(self, device: torch.device, *, offload: bool) -> "Doubling":
        return self

    def pieces(self, value: list[np.ndarray]) -> Pieces:
        return Pieces(value, lambda outputs: list(outputs), numbered=True)

    def source(self, values: list[np.ndarray]) -> Source:
        self.batches.append([value.shape for value in values])
        return Source(torch.stack([torch.from_numpy(value) for value in values]))

    def decode(self, z1: torch.Tensor, features: torch.Tensor) -> list[float]:
        return z1[:, 0, 0].tolist()


def test_pieces_of_one_shape_share_batches_and_outputs_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(Doubling(), torch.nn.Identity())  # type: ignore[arg-type]
    names: list[str] = []
    monkeypatch.setattr(pipe, "latents", lambda source, ids, seed, mode: names.extend(ids) or source.features)
    monkeypatch.setattr(pipe, "solve", lambda source, z0, settings, on_step: SimpleNamespace(z=z0))
    sizes = [[3, 3], [5], [3, 5, 3]]
    numbers = iter(range(10))
    inputs = [[np.full((size, 2), next(numbers), np.float32) for size in row] for row in sizes]
    assert pipe.outputs(inputs, ["a", "b", "c"], seed=0) == [[0, 1], [2], [3, 4, 5]]
    assert pipe.task.batches == [[(3, 2)] * 2, [(3, 2)] * 2, [(5, 2)] * 2]  # type: ignore[attr-defined]
    assert names == ["a#0", "a#1", "c#0", "c#2", "b#0", "c#1"]
