"""What a task is: the adapter between a pair of modalities and the modality-agnostic core.

A task is cut in three. Its `Parts` are what a run learns from data or opens before its flow (tokenizer, codec,
scales). The `Task` itself is the modality: training batches, sources, outputs, the model. Its `Scoring` says what is
compared with what (tasks/scoring.py). CONTRIBUTING adds a task step by step; tasks whose input is a picture extend
`crossflow.tasks.pictures.PictureTask`, which has most of it.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from crossflow.core.batch import Batch, Source
from crossflow.core.config import Config, Section
from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.core.files import write_atomically, write_tensors
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.settings import build, dump, merge, parse_overrides, read, shipped
from crossflow.core.weights import WEIGHTS, kind_of_weights, load_weights
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cache_of
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, require, resolve_spec, with_options
from crossflow.tasks import adapter_of, add_recipes_of_packages, task_names
from crossflow.tasks.scoring import Output, Scoring

C = TypeVar("C", bound=Config)
P = TypeVar("P", bound="Parts[Any]")
Example = Mapping[str, Any]
AnyScoring: TypeAlias = Scoring
REQUIRED = ("name", "Config", "Parts", "Scoring", "needs", "input_kind")
Input: TypeAlias = Any
"""A prompt (str) or a picture (np.ndarray uint8 (H, W, 3)), whichever `Task.input_kind` says."""
Report = Callable[[str], None]
"""Takes one line that says what is going on."""


class Parts(ABC, Generic[C]):
    """What a run learns from its training data or opens before its flow, and keeps in its folder. Immutable afterwards.

    Four ways lead to one: learned by a new run, loaded from a run directory, frozen networks alone (for
    `crossflow cache`), or an outline that shapes the model but holds no network and no data (for counting parameters).
    """

    @classmethod
    @abstractmethod
    def learn(cls, config: C, examples: Examples, report: Report) -> Self:
        """Learns from training examples; deterministic under config.seed."""

    @classmethod
    @abstractmethod
    def load(cls, config: C, folder: Path) -> Self:
        """Reads what `save` wrote into a run directory."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes everything that `load` needs into a run directory."""

    @classmethod
    @abstractmethod
    def outline(cls, config: C) -> Self:
        """What the settings alone determine: enough for `Task.latent_shape` and `Task.build_model`."""

    @classmethod
    def frozen(cls, config: C) -> Self:
        """The frozen networks that the settings name, for `Task.extractor`. Raises UserError for tasks without any."""
        raise UserError(
            f"The task {config.task} reads pixels and has no frozen networks, so there is nothing to cache; "
            "train on the data themselves."
        )

    def files(self) -> tuple[str, ...]:
        """Files of the run directory that sampling reads besides the weights and what `save` writes."""
        return ()


@dataclass(frozen=True)
class Pieces:
    """One input, or one output to be inverted, as the model takes it: whole, or in overlapping tiles.

    values: what `Task.source` takes (for outputs: latents z1), all of one shape; join: the outputs of the pieces -> one
    output; layout: what two inputs must share for their latents to be mixed, such as height and width; numbered:
    whether each piece has noise under its own name, as tiles have.
    """

    values: Sequence[Any]
    join: Callable[[Sequence[Any]], Any] = operator.itemgetter(0)
    layout: tuple[int, ...] = ()
    numbered: bool = False

    def names(self, name: str) -> list[str]:
        """The ids of the pieces of an input with the id `name`, which key their noise."""
        if not self.numbered and len(self.values) == 1:
            return [name]
        return [f"{name}#{index}" for index in range(len(self.values))]


class Task(ABC, Generic[C, P]):
    """A task with its configuration and its parts; complete once constructed.

    A task sets the class attributes without a default, and writes `transform`, `latent_shape`, `build_model`,
    `build_objective`, `batch`, `source`, `decode`, `target` and `write_output`.

    >>> from crossflow.tasks.base import load_config, task_class
    >>> config = load_config("sr_tiny")
    >>> task = task_class(config.task).outline(config)
    >>> task.latent_shape
    (3, 32, 32)
    >>> sorted(task.build_model().num_parameters())
    ['flow', 'source encoder']
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    Parts: ClassVar[type[Parts[Any]]]
    Scoring: ClassVar[type[Scoring]]
    needs: ClassVar[frozenset[str]]
    """Fields of the data that the task trains on: image, captions, depth, ..."""
    input_kind: ClassVar[str]
    """text | image: what a person gives it."""
    reads_features: ClassVar[bool] = False
    """Whether it has frozen networks and can train on their cached features."""
    quick: ClassVar[tuple[str, ...]] = ()
    """Overrides that shorten what comes before the flow, for runs that are only measured."""

    def __init__(self, config: C, parts: P) -> None:
        self.config = config
        self.parts = parts

    # -- how a task begins

    @classmethod
    def learn(cls, config: C, examples: Examples, report: Report) -> Self:
        """The task of a new run, with parts learned from its training examples."""
        return cls(config, cls.Parts.learn(config, examples, report))  # type: ignore[arg-type]

    @classmethod
    def load(cls, config: C, folder: Path) -> Self:
        """The task of a run directory. Raises UserError when its files are missing or damaged."""
        try:
            return cls(config, cls.Parts.load(config, folder))  # type: ignore[arg-type]
        except PARSING_ERRORS as error:
            raise UserError(
                f"The files beside the weights of the run in {folder} (tokenizer, codec, scales) are unreadable: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error

    @classmethod
    def frozen(cls, config: C) -> Self:
        """The task with its frozen networks alone, for `extractor` and for batches from a cache."""
        return cls(config, cls.Parts.frozen(config))  # type: ignore[arg-type]

    @classmethod
    def outline(cls, config: C) -> Self:
        """The task without data and networks: its model can be built and counted, not used."""
        return cls(config, cls.Parts.outline(config))  # type: ignore[arg-type]

    # -- data

    @classmethod
    @abstractmethod
    def transform(cls, config: C, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        """One example of an item. Every random choice comes from `generator`; without `augment` (validation) the item
        is taken as it is: no random crop, flip or colour.
        """

    @classmethod
    def dataset(
        cls,
        config: C,
        split: str,
        spec: str | None = None,
        *,
        limit: int | None = None,
        base: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Examples:
        """The items of a split as examples; those of `train` are augmented.

        Args:
            split: train, val, test or all.
            spec: of the data; None: those of the configuration.
            limit: maximum number of items; None: data.num_train for `train`, else all.
            base: the folder from which relative places in the configuration are taken when they do not exist here.
            options: settings of the data format, where it has them and the spec does not set them.
        """
        data = config.data
        if spec is None:
            spec = data.train if split == "train" or data.val is None else data.val
            spec = spec if base is None else resolve_spec(spec, base)
        if limit is None and split == "train":
            limit = data.num_train
        spec = with_options(spec, options or {})
        reader = open_reader(spec, split, image_size=data.image_size, limit=limit, seed=config.seed)
        reader = require(reader, cls._needs_of(reader), cls.name)
        transform = functools.partial(cls.transform, config, augment=split == "train")
        return Examples(reader, transform, seed=config.seed, max_bad=data.max_bad)

    @classmethod
    def _needs_of(cls, reader: Reader) -> frozenset[str]:
        """The fields that these data must have; the features of a cache stand in for pictures."""
        cached = cls.reads_features and "features" in reader.fields
        return cls.needs - {"image"} | {"features"} if cached else cls.needs

    @abstractmethod
    def batch(self, examples: Sequence[Any]) -> Batch:
        """Examples as one training batch, on the CPU: `features` for the source encoder, `target` z1 (B, *latent),
        `weight` where target values may be missing, `condition` for a Gaussian source, `alignment` for the encoder
        loss, and `ids`.
        """

    def collate(self, examples: Sequence[Any]) -> Batch:
        """`batch`, checked. Raises UserError when its targets have another shape than `latent_shape`."""
        batch = self.batch(examples)
        shape = tuple(batch.target.shape[1:])
        if shape != tuple(self.latent_shape):
            raise UserError(
                f"The task {self.name} has latent_shape {tuple(self.latent_shape)}, but the targets of its batches "
                f"have the shape {shape}: its methods latent_shape and batch must agree."
            )
        return batch

    # -- features computed once (crossflow cache)

    def extractor(self, options: Options) -> Extractor:
        """What computes the cached features of items."""
        raise UserError(f"The task {self.name} has no frozen networks, so there is nothing to cache.")

    def accept(self, examples: Examples) -> None:
        """Raises UserError when examples come from a cache that other networks made, or that lacks features."""
        cache = cache_of(examples.reader)
        if cache is not None:
            cache.expect(self.extractor(Options((self.config.data.image_size,))).describe())

    # -- the model

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) or (N, C) of z0 and z1 in training."""

    @abstractmethod
    def build_model(self) -> CrossFlow:
        """The source encoder and the backbone, with new weights."""

    @abstractmethod
    def build_objective(self, model: CrossFlow) -> Objective:
        """The training losses of a model, with their learned heads."""

    # -- sampling

    def pieces(self, value: Input) -> Pieces:
        """An input (a prompt, or a picture uint8 (H, W, 3)) as the model takes it: here in whole."""
        return Pieces([value])

    @abstractmethod
    def source(self, values: Sequence[Any]) -> Source:
        """Pieces of one shape as the model reads them, on the CPU."""

    @abstractmethod
    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[Any]:
        """Latents (B, *latent), on the CPU, -> outputs. features (B, ...): those of their sources, where known."""

    @property
    def decodes_features(self) -> bool:
        """Whether `decode` looks at the features of the source (FlowTiTok: at the text's)."""
        return False

    @abstractmethod
    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """A finished output (a picture, a caption, a depth map; a path to one) as latents z1 (*latent), for
        inversion.
        """

    def unknown_words(self, value: Input) -> list[str]:
        """Words of an input that the task has never seen and cannot follow; none for pictures."""
        return []

    def pictures(self, outputs: Sequence[Any]) -> list[np.ndarray]:
        """Outputs as comparable pictures uint8 (H, W, 3); empty for a task that makes no pictures."""
        return list(outputs)

    @abstractmethod
    def write_output(self, output: Output, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes an output to files named after `stem` and returns them; pictures carry the metadata."""

    # -- scoring

    def scoring(
        self, rules: Section | None = None, *, seed: int = 0, networks: Mapping[str, Any] | None = None
    ) -> AnyScoring:
        """How outputs are scored; see `Scoring`."""
        return self.Scoring(self.config, rules, seed=seed, networks=networks)


def task_class(name: str) -> type[Task]:
    """The adapter of the task `name`. Raises UserError with near names, and for an adapter that is incomplete."""
    adapter = adapter_of(name)
    where = f"{adapter.__module__}.{adapter.__qualname__}"
    if not issubclass(adapter, Task):
        raise UserError(f"The task {name!r} is registered with {where}, which is no subclass of Task.")
    missing = [
        word for word in ("name", "Config", "Parts", "Scoring", "needs", "input_kind") if not hasattr(adapter, word)
    ]
    missing += [word for word in ("Metric",) if not missing and not hasattr(adapter.Scoring, word)]
    if missing:
        raise UserError(f"The task {name!r} is incomplete: set {', '.join(missing)} on {where} or its Scoring.")
    if adapter.name != name:
        raise UserError(f"The task is registered as {name!r}, but {where}.name is {adapter.name!r}; use one name.")
    check_headline(adapter.Scoring.headline, adapter.Scoring.scores(adapter.Scoring.Rules()), f"the task {name}")
    return adapter


def check_headline(headline: Sequence[str], scores: Sequence[str], owner: str) -> None:
    """Raises UserError when a headline names a score that does not exist."""
    wrong = [name for name in headline if name not in scores]
    if wrong:
        raise UserError(
            f"The headline of {owner} names {', '.join(map(repr, wrong))}, which its metric does not compute. Its "
            f"scores are {', '.join(scores)}."
        )


def load_config(source: str | Path, overrides: Sequence[str] = (), task: str | None = None) -> Config:
    """The complete configuration of a recipe (a name, a file, or a run directory) with key=value overrides.

    Raises UserError for unknown recipes, tasks, keys and values, and when the recipe belongs to another `task`.
    """
    add_recipes_of_packages()
    if task is not None and str(source) == f"{task}_tiny" and task in task_names() and str(source) not in shipped():
        raise UserError(
            f"The task {task!r} has no recipe {task}_tiny, which `--task {task}` trains. Register the folder that "
            f"holds {task}_tiny.yaml with it, or give --config with a recipe file."
        )
    settings = merge(read(source), parse_overrides(overrides))
    name = settings.get("task")
    if name is None:
        raise UserError(
            f"The configuration {source} does not name its task. Add a line `task: "
            f"t2i`, or another of {', '.join(task_names())}."
        )
    if task is not None and name != task:
        raise UserError(
            f"The configuration {source} belongs to the task {name!r}, but --task says {task!r}. Leave out one of "
            "the two."
        )
    return build(task_class(name).Config, settings)


def load_model(folder: Path, *, weights: str | None = None, overrides: Sequence[str] = ()) -> tuple[Task, CrossFlow]:
    """The task and the model of a run directory, on the CPU.

    weights: ema | model; None: ema where the run has them. overrides: key=value settings that replace the run's. Raises
    UserError when files are missing, damaged, or do not fit.
    """
    config = load_config(folder, overrides)
    kind = kind_of_weights(folder, weights)
    task = task_class(config.task).load(config, folder)
    return task, load_weights(task.build_model, folder / WEIGHTS[kind])


def save_model(task: Task, model: CrossFlow, folder: Path, kinds: Sequence[str] = ("model",)) -> None:
    """Writes configuration, weights and parts into `folder`, which `load_model` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump(task.config))
    for kind in kinds:
        write_tensors(folder / WEIGHTS[kind], model.state_dict())
    task.parts.save(folder)


__all__ = [
    "Example",
    "Parts",
    "Pieces",
    "Report",
    "Task",
    "check_headline",
    "dump",
    "load_config",
    "load_model",
    "save_model",
    "task_class",
]
