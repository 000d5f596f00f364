"""Captioning: an image's latent flows to a text latent of the same shape, read by a parallel decoder (CrossFlow
section 5.2).

The text autoencoder is trained first and frozen (default) or further trained with the flow (`caption.joint`).
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Source
from crossflow.core.config import Config, Section
from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors, write_atomically
from crossflow.core.metrics import TaskMetric
from crossflow.core.model import CrossFlow
from crossflow.core.noise import key, keyed_generator
from crossflow.core.objective import Objective
from crossflow.core.source import Posterior, SourceEncoder
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import (
    FOLDER,
    CodecSettings,
    assumed_shape,
    encode,
    first_pictures,
    latents,
    open_codec,
    read_codec,
    unscaled_codec,
)
from crossflow.data.images import load_image, to_tensor
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.engine.sample import Pipeline
from crossflow.networks.codecs.base import Codec
from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.networks.trunks import Reconstructor
from crossflow.tasks.base import Case, Example, Pieces, Report, Task, Tile
from crossflow.tasks.caption.dataset import Captions
from crossflow.tasks.caption.decoder import TextAutoencoder, TextAutoencoderConfig, token_loss
from crossflow.tasks.caption.encoder import BagOfTokens, build_trunk
from crossflow.tasks.caption.inverted import SourceText, backwards, load_t2i

TEXT_FOLDER = "text_autoencoder"
JOINT = "extra_losses.0.autoencoder."
"""What the text autoencoder's weights are called among those of the objective, when it is trained with the flow."""
T2I_FOLDER = "t2i"
NO_PICTURES = (
    "Captions are scored on pictures, and a cache has none: name the data themselves for validation, data.val=SPEC."
)


class CaptionSettings(Section):
    vocab_size: int = Field(8192, ge=300)
    """Largest vocabulary of the tokenizer built from the captions."""
    autoencoder: TextAutoencoderConfig = TextAutoencoderConfig()
    text_steps: int = Field(600, ge=1)
    """Steps of the text autoencoder's own training, before the flow's."""
    text_batch_size: int = Field(128, ge=2)
    text_lr: float = Field(2e-3, gt=0)
    joint: bool = False
    """Go on training the text autoencoder beside the flow."""
    captions: Captions = Captions()
    conv_stem: bool = False
    """Read the picture through a few convolutions before the source encoder's layers."""
    reading: float = Field(0.0, ge=0)
    """Weight of a further encoder loss: the cross-entropy of the caption as a copy of the text decoder, trained along,
    reads it from z0. It tells the source what matters in a picture long before the flow does.
    """
    t2i: str | None = None
    """Run directory of a t2i model: caption by running it backwards (CrossFlow-T2I); with train.steps=0 only a text
    decoder is learned.
    """


class CaptionConfig(Config):
    codec: CodecSettings = CodecSettings()
    caption: CaptionSettings = CaptionSettings()


class TextLoss(nn.Module):
    """The text autoencoder's own loss beside the flow's; reads the token ids that `batch.alignment` carries."""

    def __init__(self, autoencoder: TextAutoencoder, pad: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.pad = pad

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        assert batch.alignment is not None
        self.autoencoder.train(self.training)
        losses = self.autoencoder.loss(batch.alignment, batch.alignment != self.pad)
        return {"text": losses["loss"]}


class ReadingLoss(nn.Module):
    """weight x cross-entropy of the caption's tokens, read from z0; needs the ids that `batch.alignment` carries."""

    def __init__(self, autoencoder: TextAutoencoder, weight: float) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(autoencoder.decoder).requires_grad_(True)
        self.pad, self.pad_weight = autoencoder.tokenizer.pad_token_id, autoencoder.config.pad_weight
        self.weight = weight

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        ids = batch.alignment
        assert ids is not None
        return {"reading": self.weight * token_loss(self.decoder(z0), ids, ids != self.pad, self.pad_weight)}


class ExtraLosses(nn.ModuleList):
    """Several losses of a task as one."""

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        return {name: value for loss in self for name, value in loss(batch, posterior, z0).items()}


class Adapter(Task[CaptionConfig]):
    name = "caption"
    Config = CaptionConfig
    needs = frozenset({"image", "captions"})
    reads_features = True
    input_kind = "image"
    quick = ("caption.text_steps=2",)
    headline = ("CIDEr", "BLEU-4", "ROUGE-L", "object_f1")

    codec: Codec
    text: TextAutoencoder
    assumed_shape: tuple[int, ...] | None = None
    origin: Pipeline | None = None
    """The t2i run that is run backwards, if one is."""
    text_report: dict[str, Any] | None = None
    """How well captions survive the text autoencoder; known to the process that trained it."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__(config)
        target, loss = config.loss.encoder_target, config.loss.encoder
        if loss != "none" and target not in ("image", "text"):
            raise UserError(f"loss.encoder_target = {target!r} is not possible for captioning; it is image or text.")
        if loss in ("contrastive", "sigmoid") and target == "image":
            raise UserError(
                "Captioning aligns z0 with the caption: set loss.encoder_target=text, or "
                "loss.encoder=reconstruction for the image."
            )
        if loss == "reconstruction" and target == "text":
            raise UserError(
                "The source of captioning is an image, so loss.encoder=reconstruction needs loss.encoder_target=image."
            )
        if config.caption.t2i is not None and (config.caption.joint or config.source.kind != "deterministic"):
            raise UserError(
                "A t2i run backwards starts at the image itself: set source.kind=deterministic, "
                "and leave out caption.joint."
            )
        if config.caption.t2i is None and config.train.steps == 0:
            raise UserError(
                "train.steps=0 trains no flow, so there would be nothing to caption with: set caption.t2i to the "
                "directory of a t2i run, which is then run backwards, or train.steps."
            )
        if (config.caption.joint or config.caption.t2i is not None) and config.train.num_workers > 0:
            raise UserError(
                "Targets come from a network that changes in training (caption.joint) or lies on the device "
                "(caption.t2i), of which other processes have no copy: set train.num_workers=0."
            )
        if config.caption.joint and loss == "reconstruction":
            raise UserError(
                "caption.joint goes with loss.encoder=contrastive or none; reconstruction "
                "takes the place of the token ids."
            )
        if config.caption.reading and (loss == "reconstruction" or config.caption.t2i is not None):
            raise UserError(
                f"caption.reading = {config.caption.reading:g} trains a source encoder to be read as text, which goes "
                "neither with loss.encoder=reconstruction nor with caption.t2i: set caption.reading=0."
            )

    # -- what is learned before the flow

    def prepare(self, examples: Examples, report: Report) -> None:
        settings = self.config.caption
        captions = list(examples.captions(20_000))
        torch.manual_seed(key("text autoencoder", self.config.seed))
        if settings.t2i is not None:
            self._take(load_t2i(settings.t2i))
            assert self.origin is not None
            self.text = SourceText.of(self.origin, captions, settings.vocab_size, settings.autoencoder)
        else:
            self.codec = open_codec(self.config.codec, first_pictures(examples, self.config))
            tokenizer = build_tokenizer(captions, settings.vocab_size, settings.autoencoder.max_length)
            self.text = TextAutoencoder(tokenizer, self.latent_shape, settings.autoencoder)
        report(f"Training the text autoencoder on {len(captions)} captions, {self.text.vocab_size} tokens.")
        quality = self.text.fit(
            captions,
            steps=settings.text_steps,
            batch_size=settings.text_batch_size,
            lr=settings.text_lr,
            seed=self.config.seed,
            precision="bf16" if self.config.train.precision == "bf16" else "no",
            progress=lambda step, losses: report(
                f"text autoencoder {step}/{settings.text_steps}: loss {losses['loss']:.3f}, "
                f"tokens right {losses['token_accuracy']:.3f}"
            ),
        )
        self.text_report = asdict(quality)
        report(
            f"text autoencoder: {quality.token_accuracy:.2%} of tokens and {quality.exact_match:.2%} "
            "of captions come back; latent mean "
            f"{quality.latent_mean:.2f}, standard deviation {quality.latent_std:.2f}, spread {quality.spread:.2f}."
        )

    def open_frozen(self) -> None:
        if self.config.caption.t2i is not None:
            self._take(load_t2i(self.config.caption.t2i))
        else:
            self.codec = unscaled_codec(self.config.codec)

    def extractor(self, options: Options) -> Extractor:
        """Of the pictures alone: captions are read by a text autoencoder that is trained."""
        return Extractor(options, codec=self.codec)

    def accept(self, examples: Examples) -> None:
        super().accept(examples)
        val = self.config.data.val
        if "image" not in examples.reader.fields and (val is None or val.startswith("cache:")):
            raise UserError(NO_PICTURES)

    def _take(self, pipe: Pipeline) -> None:
        """Runs `pipe`, a t2i run, backwards: its codec is ours."""
        size, ours = pipe.task.config.data.image_size, self.config.data.image_size
        if size != ours:
            raise UserError(
                f"The t2i run sees pictures of {size} pixels; set data.image_size={size} "
                f"to run it backwards (it is {ours})."
            )
        self.origin = pipe
        self.codec = pipe.task.codec  # type: ignore[attr-defined]

    def save(self, folder: Path) -> None:
        if self.origin is not None:
            self.origin.save(folder / T2I_FOLDER)
        self.codec.save(folder / FOLDER)
        self.text.save(folder / TEXT_FOLDER)
        if self.text_report is not None:
            write_atomically(folder / TEXT_FOLDER / "report.json", json.dumps(self.text_report, indent=1))

    def load(self, folder: Path) -> None:
        if self.config.caption.t2i is not None:
            self._take(load_t2i(str(folder / T2I_FOLDER)))
            assert self.origin is not None
            self.text = SourceText.load(folder / TEXT_FOLDER).attach(self.origin)
        else:
            self.codec = read_codec(folder)
            self.text = TextAutoencoder.load(folder / TEXT_FOLDER).requires_grad_(self.config.caption.joint)
            if self.config.caption.joint and (folder / "objective.safetensors").is_file():
                # What was saved before the flow is where its joint training began.
                learned = read_tensors(folder / "objective.safetensors")
                self.text.load_state_dict(
                    {name.removeprefix(JOINT): value for name, value in learned.items() if name.startswith(JOINT)}
                )

    def assume(self) -> None:
        self.assumed_shape = assumed_shape(self.config.codec, self.config.data.image_size)

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        if self.assumed_shape is not None:
            return self.assumed_shape
        return self.codec.latent_shape(self.config.data.image_size)

    @property
    def _pad(self) -> int:
        return self.text.tokenizer.pad_token_id

    def build_model(self) -> CrossFlow:
        if self.origin is not None:
            return backwards(self.origin)
        config, shape = self.config, self.latent_shape
        gaussian = config.source.kind == "gaussian"
        trunk = (
            None if gaussian else build_trunk(config.source, shape[0], config.backbone.patch, config.caption.conv_stem)
        )
        source = SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale)
        return CrossFlow(source, build_backbone(config.backbone, shape, grid_channels=shape[0] if gaussian else 0))

    def build_objective(self, model: CrossFlow) -> Objective:
        shape = self.latent_shape
        return Objective(
            model,
            self.config,
            alignment_head=BagOfTokens(self.text.vocab_size, self._pad, math.prod(shape)),
            reconstructor=Reconstructor(shape[0], shape[0]),
            extra_losses=self._extra_losses(),
        )

    def _extra_losses(self) -> "ExtraLosses":
        settings = self.config.caption
        losses: list[nn.Module] = [TextLoss(self.text, self._pad)] if settings.joint else []
        if settings.reading and self.config.source.kind != "gaussian":  # such a source says nothing to read
            losses.append(ReadingLoss(self.text, settings.reading))
        return ExtraLosses(losses)

    # -- data

    def transform(self, item: Item, generator: np.random.Generator) -> Example:
        return captioned_example(
            item, self.config.data.image_size, generator, caption=self.config.caption.captions.which
        )

    def batch(self, examples: Sequence[Example]) -> Batch:
        texts = [one["caption"] for one in examples]
        source = self._source(latents(self.codec, examples, cached_batch(examples, self.config.data.image_size)))
        ids, _ = self.text.tokenize(texts)
        return Batch(
            features=source.features,
            target=self.text.encode(texts).mean.cpu(),
            condition=source.condition,
            alignment=source.features if self.config.loss.encoder == "reconstruction" else ids.cpu(),
            ids=tuple(one["id"] for one in examples),
        )

    def _source(self, latents: Tensor) -> Source:
        return Source(latents, condition=Condition(grid=latents) if self.config.source.kind == "gaussian" else None)

    # -- sampling

    def source(self, inputs: Sequence[np.ndarray]) -> Source:
        """inputs: pictures uint8 (H, W, 3) of any size; the centre square is read."""
        size = self.config.data.image_size
        return self._source(
            encode(self.codec, torch.stack([to_tensor(center_crop_resize(image, size)) for image in inputs]))
        )

    def decode(self, z1: Tensor) -> list[str]:
        """Captions."""
        return self.text.decode(z1)

    def read_input(self, value: str | Path | np.ndarray) -> np.ndarray:
        return value if isinstance(value, np.ndarray) else load_image(value)

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        return Pieces(list(self.text.encode([str(value)]).mean.cpu()))

    def pictures(self, outputs: Sequence[str]) -> list[np.ndarray]:
        return []

    def write_output(self, output: str, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        return [write_atomically(stem.with_name(f"{stem.name}.txt"), output + "\n")]

    # -- scoring

    def cases(self, examples: Examples, limit: int) -> list[Case]:
        if "image" not in examples.reader.fields:
            raise UserError(NO_PICTURES)
        return super().cases(examples, limit)

    def case(self, item: Item) -> Case:
        return Case(item.id, item.image, item, item)

    def metric(self, thorough: bool = False) -> TaskMetric:
        from crossflow.tasks.caption.metric import JAVA_METRICS, CaptionMetric

        return CaptionMetric(java=JAVA_METRICS if thorough else ())

    def baseline(self, train: Examples, cases: Iterable[Case]) -> dict[str, float]:
        """The one caption that fits the training items best (by CIDEr), given to every picture."""
        from crossflow.tasks.caption.metric import best_single_caption

        items = list(train.items(200))
        rng = keyed_generator("single caption", self.config.seed)
        captions = [caption for item in items for caption in item.captions]
        candidates = [captions[int(i)] for i in torch.randperm(len(captions), generator=rng)[:100]]
        best = best_single_caption(candidates, [item.captions for item in items])
        metric = self.metric()
        for case in cases:
            metric.add(case.id, best, case.truth)
        return metric.compute()

    def tiles(self, case: Case, output: str) -> list[Tile]:
        picture = center_crop_resize(case.input, min(256, min(case.input.shape[:2])))
        return [Tile(picture, f"{output}\n(truth: {case.truth.captions[0]})")]
