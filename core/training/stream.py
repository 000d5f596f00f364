"""The order of the data, and the micro-batches that follow from it.

The sample at global position p = step * batch_size + k is example permutation(seed, epoch)[p mod n] of epoch p // n.
The position alone determines the example, so resuming needs no loader state, with any number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from crossflow.core.batch import Batch
from crossflow.core.noise import Noise, keyed_generator, order, training_noise
from crossflow.core.training.signals import ignore_in_worker

T = TypeVar("T")


class TrainingData(Protocol):
    """The training examples of a task."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The example `index`, augmented for `epoch`; key = (epoch, index)."""

    def collate(self, examples: list[Any]) -> Batch:
        """A batch of examples; runs in the data-loading workers, if any."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass of one process."""

    batch: Batch
    noise: Noise

    def to(self, device: torch.device) -> Self:
        """Batch and noise on `device`."""
        return replace(
            self, batch=self.batch.to(device, non_blocking=True), noise=self.noise.to(device, non_blocking=True)
        )

    def pin_memory(self) -> Self:
        """Called by the data loader."""
        return _pin(self)


def _pin(value: T) -> T:
    """`value` with the tensors of a (nested) dataclass in page-locked memory, so that copies to a GPU can overlap."""
    if isinstance(value, Tensor):
        return cast(T, value.pin_memory()) if value.device.type == "cpu" else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _pin(getattr(value, field.name)) for field in fields(value)})
    return value


class MicroBatches(Dataset[MicroBatch]):
    """(step, positions) -> the micro-batch of these global positions, with its keyed noise."""

    def __init__(self, data: TrainingData, seed: int, latent_shape: Sequence[int]) -> None:
        self.data = data
        self.seed = seed
        self.latent_shape = tuple(latent_shape)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> MicroBatch:
        step, positions = key
        places = self.examples_at(positions)
        # Data sets that load several items faster together implement this method, as for torch's loaders.
        together = getattr(self.data, "__getitems__", None)
        examples = together(places) if together else [self.data[place] for place in places]
        noise = training_noise(self.seed, step, positions, self.latent_shape)
        return MicroBatch(self.data.collate(examples), noise)

    def examples_at(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(epoch, index) of global positions."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self.data))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = order(self.seed, epoch, len(self.data))[places[chosen]]
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def example_at(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a global position."""
        return self.examples_at([position])[0]


class Positions(Sampler[tuple[int, Sequence[int]]]):
    """The (step, positions) of one rank's micro-batches, in order, from step `start` up to `stop`.

    A step's batch is cut into `accumulate` parts, each into one slice per rank, so that a gathered part holds
    consecutive positions in rank order.
    """

    def __init__(self, start: int, stop: int, batch_size: int, accumulate: int, rank: int, world_size: int) -> None:
        assert batch_size % (accumulate * world_size) == 0
        self.start, self.stop, self.batch_size, self.accumulate = start, stop, batch_size, accumulate
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, Sequence[int]]]:
        size = self.batch_size // (self.accumulate * self.world_size)
        for step in range(self.start, self.stop):
            for part in range(self.accumulate):
                first = step * self.batch_size + (part * self.world_size + self.rank) * size
                yield step, range(first, first + size)


def _unchanged(micro_batch: MicroBatch) -> MicroBatch:
    return micro_batch


def loader(dataset: MicroBatches, positions: Positions, num_workers: int, pin: bool) -> DataLoader[MicroBatch]:
    """Micro-batches in the order of `positions`, prefetched by `num_workers` processes (0: made on request)."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=positions,
        num_workers=num_workers,
        pin_memory=pin,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batching it gets the single item
        worker_init_fn=ignore_in_worker,
        # A separate generator: otherwise loading draws from the global one, and a resumed run would differ.
        generator=keyed_generator("loader", dataset.seed),
    )
