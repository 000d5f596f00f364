"""The order of the data, and the micro-batches that follow from it.

The sample at global position p = step * batch_size + k is example permutation(seed, epoch)[p mod n] of epoch p // n.
The position alone determines the example, so resuming needs no loader state, with any number of processes.

A batch is made in two places: loader workers decode and augment into a record of CPU tensors; what has weights turns
the record into a `Batch` on the training device, on a GPU beside the step before.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from crossflow.core import launcher
from crossflow.core.batch import Batch, Record, map_tensors
from crossflow.core.errors import UserError
from crossflow.core.joint import JointBatch, JointNoise
from crossflow.core.noise import Noise, Order, keyed_generator, order, training_noise
from crossflow.core.training.signals import ignore_in_worker


class TrainingData(Protocol):
    """The training examples of a task."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The example `index`, augmented for `epoch`; key = (epoch, index)."""

    def collate(self, examples: list[Any]) -> Record:
        """The record of a batch; runs in the loader workers, if any."""

    def batch(self, record: Record) -> Batch | JointBatch:
        """A record as a batch on the training device; runs in the training process."""

    @property
    def in_workers(self) -> bool:
        """Whether loader workers speed up loading, if their number is not set."""

    @property
    def ahead(self) -> bool:
        """Whether `batch` may run before the previous step has ended: not if it reads weights that the step changes."""


@dataclass(frozen=True)
class Loaded:
    """What loader workers make of a micro-batch, on the CPU."""

    record: Record
    noise: Noise | JointNoise

    def pin_memory(self) -> Self:
        """Tensors in page-locked memory, whose copies to a GPU overlap; called by the data loader."""
        return map_tensors(Tensor.pin_memory, self)


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass of one process, on its device."""

    batch: Batch | JointBatch
    noise: Noise | JointNoise

    def __len__(self) -> int:
        return len(self.batch)

    def halves(self) -> "list[MicroBatch]":
        """The first and the second half of the samples of one task, of which there must be an even number."""
        middle = len(self) // 2
        assert isinstance(self.batch, Batch), "a joint batch is not halved"
        assert isinstance(self.noise, Noise)
        assert len(self) == 2 * middle, "an odd number of samples has no halves"
        parts = []
        for rows in (slice(0, middle), slice(middle, None)):
            parts.append(MicroBatch(replace(self.batch[rows], ids=self.batch.ids[rows]), self.noise[rows]))
        return parts


class WorkerDied(Exception):
    """A loader worker has ended before its time; exit_code: -N after signal N."""

    def __init__(self, pid: int, exit_code: int) -> None:
        super().__init__(f"loader worker {pid} ended with exit code {exit_code}")
        self.pid, self.exit_code = pid, exit_code


@dataclass(frozen=True)
class Refused:
    """The message of a UserError in a loader worker. It travels as a value, since torch puts a traceback into texts."""

    message: str


class MicroBatches(Dataset[Loaded | Refused]):
    """(step, positions) -> the micro-batch of these global positions, with its keyed noise.

    In a loader worker a UserError of the data becomes a `Refused`.
    """

    def __init__(self, data: TrainingData, seed: int, latent_shape: Sequence[int]) -> None:
        self.data = data
        self.seed = seed
        self.latent_shape = tuple(latent_shape)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Loaded | Refused:
        try:
            return self._load(*key)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Refused(str(error))

    def _load(self, step: int, positions: Sequence[int]) -> Loaded:
        return self.load(step, positions, positions)

    def load(self, step: int, positions: Sequence[int], keys: Sequence[int]) -> Loaded:
        """The examples at `positions` of the order of the data; keys: the global positions that key their noise."""
        places = self.examples_at(positions)
        # Data sets that load several items faster together implement this method, as for torch's loaders.
        together = getattr(self.data, "__getitems__", None)
        examples = together(places) if together else [self.data[place] for place in places]
        noise = training_noise(self.seed, step, keys, self.latent_shape)
        return Loaded(self.data.collate(examples), noise)

    def examples_at(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(epoch, index) of global positions."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self.data))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._order(epoch)[places[chosen]]
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def _order(self, epoch: int) -> Order:
        # Data that lie far away implement this method, so that the examples of some steps lie together.
        own = getattr(self.data, "order", None)
        return own(self.seed, epoch) if own else order(self.seed, epoch, len(self.data))

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


def _unchanged(loaded: Loaded | Refused) -> Loaded | Refused:
    return loaded


def num_loaders(setting: int | None, data: TrainingData, device: torch.device) -> int:
    """The number of loader workers of this process: `setting`, or by default a number that its cores can feed.

    A GPU leaves the cores to the workers, of which eight feed most steps; on the CPU the step itself uses every core,
    and more than a quarter of them would slow it down.
    """
    if setting is not None:
        return setting
    if not data.in_workers:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= launcher.local_world_size()
    return max(0, min(4, cores // 4) if device.type == "cpu" else min(8, cores - 1))


def loader(dataset: MicroBatches, positions: Positions, num_workers: int, pin: bool) -> DataLoader[Loaded | Refused]:
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


def loaded(dataset: MicroBatches, positions: Positions, num_workers: int, pin: bool) -> Generator[Loaded]:
    """The micro-batches of `loader` one by one; its workers end with the iterator.

    Raises UserError as the data do, and WorkerDied.
    """
    iterator = iter(loader(dataset, positions, num_workers, pin))
    workers = list(getattr(iterator, "_workers", ()))
    try:
        for item in iterator:
            if isinstance(item, Refused):
                raise UserError(item.message)
            yield item
    except RuntimeError as error:
        dead = [(worker.pid, worker.exitcode) for worker in workers if worker.exitcode is not None]
        if not dead:
            raise
        raise WorkerDied(*dead[0]) from error
    finally:
        del iterator  # which asks the workers to end
        for worker in workers:
            if worker.is_alive():  # in the middle of an item; they ignore SIGTERM, and this process would wait for them
                worker.kill()


def on_device(
    items: Iterable[Loaded], batch: Callable[[Record], Batch | JointBatch], device: torch.device, *, ahead: bool
) -> Generator[MicroBatch]:
    """The micro-batches of loaded items on `device`, in order; batch: as `TrainingData.batch`.

    ahead: on a GPU, make each in a second stream while the previous one is trained on.
    """

    def make(item: Loaded) -> MicroBatch:
        return MicroBatch(batch(item.record), item.noise.to(device, non_blocking=True))

    if device.type != "cuda" or not ahead:
        yield from map(make, items)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # the networks may still be on their way to the device
    pending: tuple[MicroBatch, torch.cuda.Event] | None = None
    for item in items:
        with torch.cuda.stream(stream):
            following = make(item), stream.record_event()
        if pending is not None:
            yield _claimed(*pending, device)
        pending = following
    if pending is not None:
        yield _claimed(*pending, device)


def _claimed(micro_batch: MicroBatch, ready: torch.cuda.Event, device: torch.device) -> MicroBatch:
    """A micro-batch of another stream for use in the present one, which waits for it on the device."""
    current = torch.cuda.current_stream(device)
    current.wait_event(ready)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(current)  # its memory is not given away while this stream still reads it
        return tensor

    return map_tensors(keep, micro_batch)
