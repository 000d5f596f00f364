"""What a task is: the adapter between a pair of modalities and the modality-agnostic core, and the registry of tasks.

A task's life: built from its configuration; `prepare`d once on the training data (tokenizer, scales, a text
autoencoder), after which `save` and `load` carry what it learned; then it builds the model and its objective, turns
items into batches, inputs into sources, latents into outputs, and scores outputs.
"""

import importlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from crossflow.core.batch import Batch, Source
from crossflow.core.config import Config
from crossflow.core.errors import PARSING_ERRORS, UserError, unknown_name
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.settings import build, dump, merge, parse_overrides, read
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cache_of
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, require
from crossflow.engine.provenance import open_again
from crossflow.tasks import task_names

C = TypeVar("C", bound=Config)
Example = Mapping[str, Any]
Flow = Callable[[Source, Sequence[str]], Tensor]
"""(source of B items, their ids) -> z1 (B, *latent): posterior, keyed sample, ODE."""
Report = Callable[[str], None]
"""Takes one line that tells a person what is going on."""


@dataclass(frozen=True)
class Case:
    """One thing to be scored: what goes in, what is right, and the item behind it (None when there is only a
    prompt).
    """

    id: str
    input: Any
    truth: Any
    item: Item | None = None


@dataclass(frozen=True)
class Tile:
    """A picture (H, W, 3) uint8 with the words under it."""

    image: np.ndarray
    text: str = ""


@dataclass(frozen=True)
class Pieces:
    """One input, or one output to be inverted, as the model takes it: whole, or in overlapping tiles.

    values: what `Task.source` takes (for outputs: latents z1), all of one shape; join: one output of those of the
    pieces; layout: what two inputs must agree in for their latents to be mixed, such as their height and width.
    """

    values: Sequence[Any]
    join: Callable[[Sequence[Any]], Any] = operator.itemgetter(0)
    layout: tuple[int, ...] = ()


class Task(ABC, Generic[C]):
    """One task adapter; see the module's docstring. `needs` names the reader's fields that the task lives on."""

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    needs: ClassVar[frozenset[str]]
    run_folder: Path | None = None
    """The run directory that the task was read from, whose manifest tells where its data lay."""
    input_kind: ClassVar[str]
    """text | image: what a person gives it."""

    def __init__(self, config: C) -> None:
        width = config.source.width
        if width % 4 or width % max(1, width // 32):  # the trunks have one head for each 32 values
            raise UserError(f"source.width = {width} is not possible; take a multiple of 32, or of 4 below 64.")
        self.config = config

    # -- what is learned before the flow

    @abstractmethod
    def prepare(self, examples: Examples, report: Report) -> None:
        """Learns from the training items what the flow presupposes; deterministic under config.seed."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `prepare` learned into the run directory."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""

    def restore(self, folder: Path) -> None:
        """`load`, with a UserError whatever is wrong with the files."""
        try:
            self.load(folder)
        except PARSING_ERRORS as error:
            raise UserError(
                f"What the run in {folder} keeps beside its weights (tokenizer, codec, scales) cannot be read: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error

    def assume(self) -> None:
        """Instead of `load`: takes from the settings alone what shapes the model, so that `build_model` can count
        parameters without data and without the frozen networks.
        """

    # -- the model

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of z0 and z1 in training."""

    @abstractmethod
    def build_model(self) -> CrossFlow: ...

    @abstractmethod
    def build_objective(self, model: CrossFlow) -> Objective: ...

    # -- data

    @abstractmethod
    def transform(self, item: Item, generator: np.random.Generator) -> Example:
        """One training example of an item, augmented by `generator` alone."""

    @abstractmethod
    def batch(self, examples: Sequence[Example]) -> Batch: ...

    def dataset(self, split: str, spec: str | None = None, limit: int | None = None) -> Examples:
        """The items of a split (train | val | test) as training examples; spec: that of the configuration when None."""
        data = self.config.data
        if limit is None and split == "train":
            limit = data.num_train

        def opened(given: str) -> Reader:
            return open_reader(given, split, image_size=data.image_size, limit=limit, seed=self.config.seed)

        configured = data.train if split == "train" or data.val is None else data.val
        if spec is None and self.run_folder is not None:
            reader = open_again(opened, configured, self.run_folder)
        else:
            reader = opened(spec or configured)
        reader = require(reader, self._needs_of(reader), self.name)
        return Examples(reader, self.transform, seed=self.config.seed, max_bad=data.max_bad)

    def _needs_of(self, reader: Reader) -> frozenset[str]:
        """The fields that these data must have; the features of a cache stand in for pictures."""
        cached = self.reads_features and "features" in reader.fields
        return self.needs - {"image"} | {"features"} if cached else self.needs

    # -- features computed once (crossflow cache)

    reads_features: ClassVar[bool] = False
    """Whether the task has frozen networks and can train on what they computed before."""

    def open_frozen(self) -> None:
        """Instead of `prepare` or `load`: opens the frozen networks that the settings name, for `extractor`."""

    def extractor(self, options: Options) -> Extractor:
        """What computes the features of items. Raises UserError for a task without frozen networks."""
        raise UserError(
            f"The task {self.name} reads pixels and has no frozen networks, so there is nothing to cache; "
            "train on the data themselves."
        )

    def accept(self, examples: Examples) -> None:
        """Raises UserError when examples are from a cache that other networks made, or that lacks something."""
        cache = cache_of(examples.reader)
        if cache is not None:
            cache.expect(self.extractor(Options((self.config.data.image_size,))).describe())

    # -- sampling

    @abstractmethod
    def source(self, inputs: Sequence[Any]) -> Source:
        """Inputs of one shape as the model reads them, on the CPU."""

    @abstractmethod
    def decode(self, z1: Tensor) -> list[Any]:
        """Latents (B, *latent) -> outputs."""

    decodes_features: bool = False
    """Whether the decoder also looks at the features of the source (FlowTiTok: at the text's)."""

    def decode_with(self, z1: Tensor, features: Tensor) -> list[Any]:
        """Latents (B, *latent) and the features (B, ...) of their sources -> outputs."""
        return self.decode(z1)

    def run(self, inputs: Sequence[Any], flow: Flow, ids: Sequence[str]) -> list[Any]:
        """Inputs -> outputs through `flow`; a task whose inputs differ in size or are cut into tiles says how here."""
        source = self.source(inputs)
        return self.decode_with(flow(source, ids), source.features)

    @abstractmethod
    def read_input(self, value: str | Path | np.ndarray) -> Any:
        """What a person gave (a prompt, a path, a picture (H, W, 3) uint8) as an input."""

    def pieces(self, value: Any) -> Pieces:
        """A read input as the latent tools take it: in whole, or resized or cut as `run` does."""
        return Pieces([value])

    @abstractmethod
    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """What the task makes (a picture, a caption, a depth map; a path to one) as latents z1 (*latent), to be
        inverted.
        """

    def pictures(self, outputs: Sequence[Any]) -> list[np.ndarray]:
        """Outputs as pictures uint8 (H, W, 3) that can be compared; none for a task that makes no pictures."""
        return list(outputs)

    @abstractmethod
    def write_output(self, output: Any, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes an output to files named after `stem` and returns them; pictures carry the metadata."""

    # -- scoring

    @abstractmethod
    def case(self, item: Item) -> Case | None:
        """What is scored on an item of an evaluation split; None when nothing can be."""

    def cases(self, examples: Examples, limit: int) -> list[Case]:
        """What is scored on the first items of an evaluation split, all in memory."""
        return [case for item in examples.items(limit) if (case := self.case(item)) is not None]

    @abstractmethod
    def metric(self, thorough: bool = False) -> TaskMetric:
        """The task's metric; thorough: with numbers that take long or need more than Python, where they can be had."""

    @abstractmethod
    def baseline(self, train: Examples, cases: Iterable[Case]) -> dict[str, float]:
        """Scores of the trivial baseline on the same cases; empty when the metric itself carries its control."""

    @abstractmethod
    def tiles(self, case: Case, output: Any) -> list[Tile]:
        """Source, output and truth of a case, side by side."""

    quick: ClassVar[tuple[str, ...]] = ()
    """Overrides that shorten what comes before the flow, for when a run is only measured."""
    headline: ClassVar[tuple[str, ...]] = ()
    """Names of the scores shown first."""


def task_class(name: str) -> type[Task]:
    """The adapter called `name`, from the folder of that name beside this file. Raises UserError with near names."""
    if name not in task_names():
        raise unknown_name("task", str(name), task_names())
    return importlib.import_module(f"crossflow.tasks.{name}").Adapter


def load_config(source: str | Path, overrides: Sequence[str] = (), task: str | None = None) -> Config:
    """The complete configuration of a recipe (shipped name, file, or run directory) with key=value overrides.

    Raises UserError for unknown recipes, tasks, keys and values, and when the recipe belongs to another `task`.
    """
    settings = merge(read(source), parse_overrides(overrides))
    name = settings.get("task")
    if name is None:
        raise UserError(
            f"The configuration {source} does not say its task. Add a line `task: "
            f"t2i`, or another of {', '.join(task_names())}."
        )
    if task is not None and name != task:
        raise UserError(
            f"The configuration {source} is one for the task {name!r}, but --task "
            f"says {task!r}. Leave out one of the two."
        )
    return build(task_class(name).Config, settings)


def build_task(config: Config) -> Task:
    return task_class(config.task)(config)


__all__ = [
    "Case",
    "Example",
    "Flow",
    "Pieces",
    "Report",
    "Task",
    "Tile",
    "build_task",
    "dump",
    "load_config",
    "task_class",
]
