"""What a task is: the adapter between a pair of modalities and the modality-agnostic core.

A task is cut in three. Its `Parts` are what a run learns from data or opens before its flow (tokenizer, codec,
scales). The `Task` itself is the modality: training batches, sources, outputs, the model. Its `Scoring` says what is
compared with what. Whatever has weights runs on the task's device, in batches; loader workers read and augment.
CONTRIBUTING adds a task step by step; tasks whose input is a picture extend `PictureTask`, those from picture to
picture in pixel space `PixelTask`, which has most of it.
B batch, C channels, H W height width, N tokens.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Record, Source, map_tensors
from crossflow.core.config import Config, Section
from crossflow.core.errors import PARSING_ERRORS, UserError, unknown_name
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.source import SourceEncoder
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cache_of
from crossflow.data.cases import Case, Cases, ItemCases, OpenData, Tile, is_picture
from crossflow.data.combined import Combination, combined_pictures
from crossflow.data.dataset import Examples
from crossflow.data.images import load_image, save_png, to_tensor, to_uint8
from crossflow.data.item import Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, require, resolve_spec, with_options
from crossflow.data.tiles import fit_shorter_side, resize_image
from crossflow.networks.codecs.pixel import PixelCodec
from crossflow.networks.codecs.registry import load_codec
from crossflow.networks.frozen import Frozen
from crossflow.networks.picture_distances import picture_distance
from crossflow.networks.trunks import Reconstructor

C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=Section)
P = TypeVar("P", bound="Parts[Any]")
PP = TypeVar("PP", bound="PixelParts")
Example = Mapping[str, Any]
Input: TypeAlias = Any
"""A prompt (str) or a picture (np.ndarray uint8 (H, W, 3)), whichever `Task.input_kind` says."""
Output: TypeAlias = Any
"""What a task makes: a picture, a depth map, a caption, ..."""
Report = Callable[[str], None]
"""Takes one line that says what is going on."""
REQUIRED = ("name", "Config", "Parts", "Scoring", "needs", "input_kind")
"""Attributes that a task must set."""

NUM_MEASURED = 256
"""Training examples that scales are measured on."""
CODEC_FOLDER = "codec"


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

    def revised(self, before: C, config: C, examples: Examples, report: Report) -> Self:
        """These parts of a run with the settings `before`, for one that goes on with `config`; here as they are."""
        return self

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


class NoRules(Section):
    """Of a task about which protocols fix nothing."""


class Scoring(ABC, Generic[C, R]):
    """How outputs of a run are scored. A task writes at least `case`, and names its `Metric` and `headline`.

    Args:
        config: of the run.
        rules: of a protocol; None: the rules by which a run scores itself (`own_rules`).
        seed: of what is drawn for scoring (prompts, shuffled controls); never that of an evaluated run, since runs with
            other seeds must be scored on the same cases.
        networks: measuring networks by role, opened at the first look-up.
    """

    Rules: ClassVar[type[Section]] = NoRules
    """What a protocol may fix for this task: a section of settings."""
    Metric: ClassVar[type[TaskMetric]]
    headline: ClassVar[tuple[str, ...]] = ()
    """Names of the scores shown first."""
    section: ClassVar[str] = ""
    """Name of the section of a protocol that holds the rules; the task's name when empty."""
    networks_by_role: ClassVar[Mapping[str, Callable[[str, torch.device], Any]]] = {}
    """Role -> (source, device) -> measuring network with a `checksum`; `features` and `lpips` belong to every task."""

    def __init__(
        self, config: C, rules: R | None = None, *, seed: int = 0, networks: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.seed, self.networks = config, seed, networks or {}
        self.by_protocol = rules is not None
        self.rules: R = self.own_rules() if rules is None else rules

    def own_rules(self) -> R:
        """The rules of a run that is scored without a protocol."""
        return self.Rules()  # type: ignore[return-value]

    @classmethod
    def scores(cls, rules: Section) -> tuple[str, ...]:
        """Names of all scores that the metric can give under `rules`."""
        return cls.Metric.names

    # -- what is scored

    @property
    def options(self) -> Mapping[str, str]:
        """Settings of the data format that scoring needs, where a format has them and its spec does not say
        otherwise.
        """
        return {}

    @property
    def resize(self) -> str:
        """In words, what is done to pictures before the model sees them; stands in the manifest."""
        return f"centre square, antialiased bicubic to {self.config.data.image_size} px"

    @abstractmethod
    def case(self, item: Item) -> Case:
        """What is scored on an item; raises BadItem when nothing can be."""

    def cases(self, examples: Examples, limit: int) -> Cases:
        """The cases of opened data, at most `limit`."""
        return ItemCases(examples, self.case)

    def open_cases(self, open_data: OpenData, spec: str | None, split: str, limit: int) -> Cases:
        """The cases of a split of the data at `spec`; None: the run's validation data."""
        return self.cases(open_data(split, spec, limit=limit, options=self.options), limit)

    # -- how

    def metric(self, *, thorough: bool = False) -> TaskMetric:
        """A new, empty metric. thorough: with numbers that take long or need more than Python, where available."""
        return self.Metric()

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any] | None:
        """Case -> the output of the trivial baseline, perhaps learned from the training items (epoch 0, not augmented);
        None when the metric carries its own control.
        """
        return None

    def baseline(self, open_train: Callable[[], Examples], cases: Iterable[Case]) -> dict[str, float]:
        """The scores of the trivial output on the same cases; empty without one."""
        trivial = self.trivial(open_train)
        if trivial is None:
            return {}
        metric = self.metric()
        for case in cases:
            metric.add(case.id, trivial(case), case.truth)
        return metric.compute()

    def tiles(self, case: Case, output: Output) -> list[Tile]:
        """Input, output and truth of a case, side by side; here those of them that are pictures."""
        named = (("input", case.input), ("output", output), ("truth", case.truth))
        return [Tile(value, name) for name, value in named if is_picture(value)]


AnyScoring: TypeAlias = Scoring
"""The class by another name, since `Task.Scoring` hides it inside the class."""


AnyConfig: TypeAlias = Config
"""As `AnyScoring`."""


class Task(ABC, Generic[C, P]):
    """A task with its configuration and its parts; complete once constructed.

    A task sets the class attributes without a default, and writes `transform`, `latent_shape`, `build_model`,
    `build_objective`, `batch`, `source`, `decode`, `target` and `write_output`.

    >>> from crossflow.tasks import load_config, task_class
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
    hub_tag: ClassVar[str | None] = None
    """The hub's name of the kind of model (`pipeline_tag`), such as text-to-image."""
    quick: ClassVar[tuple[str, ...]] = ()
    """Overrides that shorten what comes before the flow, for runs that are only measured."""

    flow_alone: ClassVar[tuple[str, ...]] = ()
    """Overrides under which nothing but the flow is trained, for runs that learn from a trained one."""

    def __init__(self, config: C, parts: P) -> None:
        self.config = config
        self.parts = parts
        self.device = torch.device("cpu")

    # -- where it computes

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks of its parts, which `to` moves; none for a task that computes on plain numbers."""
        return ()

    @property
    def reads_trained_weights(self) -> bool:
        """Whether `batch` reads weights that training changes, so that it must not run ahead of the step."""
        return False

    def to(self, device: torch.device | str, *, offload: bool = False) -> Self:
        """Moves the networks to the device where batches, sources and outputs are computed; returns self.

        offload: frozen networks stay on the CPU and visit the device while they compute.
        """
        self.device = torch.device(device)
        for network in self.networks:
            if offload and isinstance(network, Frozen):
                network.offload(self.device)
            else:
                network.to(self.device)
        return self

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

    @classmethod
    def backwards(cls, settings: Mapping[str, Any], other: AnyConfig, run: str) -> dict[str, Any]:
        """The settings with which this task runs the flow of another task backwards instead of having its own.

        Args:
            settings: of this task, nested and complete up to defaults.
            other: the configuration of the other task, which is trained in the run directory `run`.

        Raises:
            UserError: this task cannot do so with such a task, or their latents differ.
        """
        raise UserError(
            f"The task {cls.name} has no way to run the flow of {other.task} backwards. Leave out "
            f"directions.{cls.name}."
        )

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

    def collate(self, examples: Sequence[Any]) -> Record:
        """Examples as one record, in a loader worker: no weights. Here tensors are stacked, other values kept."""
        return {name: _together([example[name] for example in examples]) for name in examples[0]}

    @abstractmethod
    def batch(self, record: Record) -> Batch:
        """A record, on the task's device, as one training batch: `features` for the source encoder, `target` z1
        (B, *latent), `weight` where target values may be missing, `condition` for a Gaussian source, `alignment` for
        the encoder loss, and `ids`.
        """

    @torch.no_grad()
    def prepare(self, record: Record) -> Batch:
        """The `batch` of a record of the CPU, on the task's device.

        Raises UserError when its targets have another shape than `latent_shape`.
        """
        moved = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), record)
        batch = self.batch(moved).to(self.device)
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
        """Pieces of one shape as the model reads them, on the task's device."""

    def as_source(self, inputs: Tensor, mask: Tensor | None = None) -> Source:
        """What the model reads of inputs that are tensors already: token ids or features with their mask, or pixels
        (B, 3, H, W) in [-1, 1]. Raises UserError for a task that does not say.
        """
        raise self._not_written("as_source")

    @abstractmethod
    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[Any]:
        """Latents (B, *latent), on the task's device, -> outputs. features (B, ...): those of their sources, where
        known.
        """

    def decoded(self, z1: Tensor, features: Tensor | None = None) -> Tensor:
        """Latents as the tensor (B, ...) that `decode` makes outputs of: pixels in [-1, 1], depth, token logits. Raises
        UserError for a task that does not say.
        """
        raise self._not_written("decoded")

    def _not_written(self, method: str) -> UserError:
        return UserError(
            f"The task {self.name} has no method {method}, so its models cannot be exported as graphs. Write it as "
            "CONTRIBUTING.md says, or use the model by crossflow.load."
        )

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

    @property
    def combination(self) -> Combination:
        """What makes one output of several for an input. Raises UserError where these are different answers."""
        raise UserError(
            f"Outputs of the task {self.name} are different answers rather than estimates of one, so there is nothing "
            "to combine. Use --num for several of them."
        )

    @abstractmethod
    def write_output(self, output: Output, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes an output to files named after `stem` and returns them; pictures carry the metadata."""

    # -- scoring

    def scoring(
        self, rules: Section | None = None, *, seed: int = 0, networks: Mapping[str, Any] | None = None
    ) -> AnyScoring:
        """How outputs are scored; see `Scoring`."""
        return self.Scoring(self.config, rules, seed=seed, networks=networks)


@dataclass(frozen=True)
class PixelParts(Parts[Config]):
    """The mean and spread of the target pictures' pixels, measured on the training data."""

    codec: PixelCodec

    @classmethod
    def learn(cls, config: Config, examples: Examples, report: Report) -> Self:
        """Measures the pixels of the first training targets."""
        targets = torch.stack([example["target"] for example in examples.first(NUM_MEASURED)])
        codec = PixelCodec(3)
        codec.fit_scale([targets])
        report(f"pixels: mean {codec.shift.mean():.3f}, standard deviation {(1 / codec.scale).mean():.3f}")
        return cls(codec)

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """Reads the codec. Raises UserError for a codec of another kind."""
        codec = load_codec(folder / CODEC_FOLDER)
        if not isinstance(codec, PixelCodec):
            raise UserError(f"{folder / CODEC_FOLDER} holds a codec of the kind {codec.kind!r}; expected pixel.")
        return cls(codec)

    def save(self, folder: Path) -> None:
        """Writes the codec."""
        self.codec.save(folder / CODEC_FOLDER)

    @classmethod
    def outline(cls, config: Config) -> Self:
        """A codec whose scale is not measured."""
        return cls(PixelCodec(3))


class PictureTask(Task[C, P]):
    """A task from a picture. A subclass writes `transform` ({"id", "source" (C, H, W), "target"}), `build_trunk`,
    `batch`, `decode` and `target`; or extends `PixelTask`, which has all but the first two.
    """

    input_kind = "image"
    source_channels: ClassVar[int] = 3

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(3, data.image_size, data.image_size)."""
        return (3, self.config.data.image_size, self.config.data.image_size)

    @abstractmethod
    def build_trunk(self) -> nn.Module:
        """The network of the source encoder: features (B, C, H, W) -> (B, 2, *latent), any H and W of whole patches."""

    def build_model(self) -> CrossFlow:
        """The trunk in core's source encoder, and the backbone; a Gaussian source has no trunk."""
        config, shape = self.config, self.latent_shape
        trunk = None if config.source.kind == "gaussian" else self.build_trunk()
        source = SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale)
        grid_channels = self.source_channels if config.source.conditions else 0
        return CrossFlow(source, build_backbone(config.backbone, shape, grid_channels=grid_channels))

    def build_objective(self, model: CrossFlow) -> Objective:
        """The flow loss, and where the settings ask for it the reconstruction of the source picture from z0 and a loss
        of decoded end points.
        """
        return Objective(
            model,
            self.config,
            reconstructor=Reconstructor(self.latent_shape[0], self.source_channels),
            decoded_loss=self.decoded_loss(),
        )

    def decoded_loss(self) -> nn.Module | None:
        """(z1 (B, *latent), batch) -> (B,): the loss of finished outputs that `loss.decoded` names; None without one.

        Raises UserError for one that this task lacks.
        """
        name = self.config.loss.decoded
        if name == "none":
            return None
        raise unknown_name(f"loss.decoded of the task {self.name}", name, ("none",))

    def source(self, values: Sequence[np.ndarray]) -> Source:
        """Pictures uint8 (H, W, 3) of one size."""
        return self.as_source(to_tensors(values).to(self.device))

    def as_source(self, inputs: Tensor, mask: Tensor | None = None) -> Source:
        """Pictures (B, 3, H, W) in [-1, 1] as features, and as the condition of a backbone that reads one."""
        return Source(inputs, condition=Condition(grid=inputs) if self.config.source.conditions else None)

    def pieces(self, value: np.ndarray) -> Pieces:
        """The picture with its shorter side at data.image_size; outputs are brought back to the picture's size."""
        fitted = fit_shorter_side(value, self.config.data.image_size, self.config.backbone.grain)
        return Pieces([fitted], lambda outputs: self.resize(outputs[0], value.shape[:2]), fitted.shape[:2])

    def resize(self, output: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An output at the height and width of its input."""
        return resize_image(output, (shape[0], shape[1]))

    def write_output(self, output: np.ndarray, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes a picture uint8 (H, W, 3) as PNG."""
        return [save_png(output, stem.with_name(f"{stem.name}.png"), metadata)]


class PixelLoss(nn.Module):
    """A distance between the pictures of latents z1 and those of a batch's targets."""

    def __init__(self, codec: PixelCodec, distance: nn.Module) -> None:
        super().__init__()
        self.codec, self.distance = codec, distance

    def forward(self, z1: Tensor, batch: Batch) -> Tensor:
        """z1 (B, *latent) -> (B,)."""
        return self.distance(self.codec.decode(z1), self.codec.decode(batch.target))


class PixelTask(PictureTask[C, PP]):
    """A task from picture to picture in pixel space: latents are pixels scaled to unit variance."""

    Parts = PixelParts

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The codec, which has a scale but no weights."""
        return (self.parts.codec,)

    def as_source(self, inputs: Tensor, mask: Tensor | None = None) -> Source:
        """Pictures (B, 3, H, W) in [-1, 1] as scaled pixels."""
        return super().as_source(self.parts.codec.encode(inputs).mean)

    def batch(self, record: Record) -> Batch:
        """Examples {"id", "source", "target"}: both pictures as scaled pixels."""
        source = self.as_source(record["source"])
        return Batch(
            features=source.features,
            target=self.parts.codec.encode(record["target"]).mean,
            condition=source.condition,
            alignment=source.features,
            ids=record["id"],
        )

    @property
    def combination(self) -> Combination:
        """The mean of pictures."""
        return combined_pictures

    def decoded_loss(self) -> nn.Module | None:
        """A distance between pictures: l1, ssim or features; see `PictureTask.decoded_loss`."""
        loss = self.config.loss
        if loss.decoded == "none":
            return None
        return PixelLoss(self.parts.codec, picture_distance(loss.decoded, loss.decoded_network))

    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3)."""
        return list(to_uint8(self.decoded(z1)))

    def decoded(self, z1: Tensor, features: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W)."""
        return self.parts.codec.decode(z1)

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """A finished picture uint8 (H, W, 3), or the path of one, as scaled pixels."""
        pieces = self.pieces(as_picture(value))
        latents = self.parts.codec.encode(to_tensors(pieces.values).to(self.device)).mean
        return Pieces(list(latents), pieces.join, pieces.layout, pieces.numbered)


def _together(values: Sequence[Any]) -> Tensor | tuple[Any, ...]:
    """The values of B examples under one name: tensors stacked (B, ...), others as a tuple."""
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else tuple(values)


def to_tensors(images: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 (H, W, 3) of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def as_picture(value: str | Path | np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, 3), read where `value` is a path."""
    return value if isinstance(value, np.ndarray) else load_image(value)
