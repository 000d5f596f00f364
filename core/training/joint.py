"""The data of several tasks as those of one training.

The sample at global position p is of task p mod K: the example at position p // K of that task's own order, with the
noise of p. So a batch has equally many samples of each task, nothing but the position decides which, and one task alone
is trained as it is without the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from crossflow.core.batch import Record
from crossflow.core.joint import JointBatch, JointNoise
from crossflow.core.training.stream import Loaded, MicroBatches, TrainingData


class JointData:
    """The training data of several tasks, and the shapes of their latents, by name."""

    def __init__(self, members: Mapping[str, TrainingData], latent_shapes: Mapping[str, Sequence[int]]) -> None:
        self.members, self.latent_shapes = dict(members), dict(latent_shapes)

    def __len__(self) -> int:
        """The number of samples after which each task has seen all of its examples."""
        return len(self.members) * max(map(len, self.members.values()))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        raise TypeError("the examples of several tasks are read through their own data")

    def collate(self, examples: list[Any]) -> Record:
        """Not used: each task collates its own examples."""
        raise TypeError("the examples of several tasks are collated by their own data")

    def batch(self, record: Record) -> JointBatch:
        """The records of the tasks by name as a batch of all."""
        return JointBatch({name: data.batch(record[name]) for name, data in self.members.items()})  # type: ignore[misc]

    @property
    def in_workers(self) -> bool:
        """Whether loader workers speed up loading of any task."""
        return any(data.in_workers for data in self.members.values())

    @property
    def ahead(self) -> bool:
        """Whether batches of all tasks may be made ahead of the step."""
        return all(data.ahead for data in self.members.values())


class JointMicroBatches(MicroBatches):
    """(step, positions) -> the micro-batch of these global positions, which hold equally many of each task."""

    def __init__(self, data: JointData, seed: int) -> None:
        super().__init__(data, seed, ())
        self.members = {
            name: MicroBatches(member, seed, data.latent_shapes[name]) for name, member in data.members.items()
        }

    def _load(self, step: int, positions: Sequence[int]) -> Loaded:
        num, loaded = len(self.members), {}
        for turn, (name, member) in enumerate(self.members.items()):
            own = [position for position in positions if position % num == turn]
            loaded[name] = member.load(step, [position // num for position in own], own)
        noise = JointNoise({name: part.noise for name, part in loaded.items()})  # type: ignore[misc]
        return Loaded({name: part.record for name, part in loaded.items()}, noise)


def micro_batches(data: TrainingData | JointData, seed: int, latent_shape: Sequence[int]) -> MicroBatches:
    """The micro-batches of the data of one task, or of several, whose latent shapes the data know."""
    return JointMicroBatches(data, seed) if isinstance(data, JointData) else MicroBatches(data, seed, latent_shape)
