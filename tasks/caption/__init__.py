"""Captioning: an image's latent flows to a text latent of the same shape, read by a parallel decoder (CrossFlow
section 5.2).

The text autoencoder is trained first and frozen (default) or further trained with the flow (`caption.joint`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core import distributed
from crossflow.core.backbones import build_backbone
from crossflow.core.batch import Batch, Condition, Record, Source
from crossflow.core.config import DataConfig
from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors, write_atomically
from crossflow.core.model import CrossFlow
from crossflow.core.noise import key
from crossflow.core.objective import Objective
from crossflow.core.settings import merge
from crossflow.core.source import SourceEncoder
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import (
    FOLDER,
    assumed_shape,
    collate_pictures,
    first_pictures,
    latents,
    open_codec,
    read_codec,
    unscaled_codec,
)
from crossflow.data.item import Item
from crossflow.data.resize import center_crop_resize
from crossflow.networks.codecs.base import Codec
from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.networks.trunks import Reconstructor
from crossflow.tasks.base import AnyConfig, Example, Parts, Pieces, Report, Task, to_tensors
from crossflow.tasks.caption.config import CaptionConfig
from crossflow.tasks.caption.decoder import TextAutoencoder, TextReport, TextTraining
from crossflow.tasks.caption.encoder import BagOfTokens, build_trunk
from crossflow.tasks.caption.inverted import Origin, SourceText
from crossflow.tasks.caption.objective import ExtraLosses, ReadingLoss, TextLoss
from crossflow.tasks.caption.scoring import NO_PICTURES, CaptionScoring

TEXT_FOLDER, T2I_FOLDER = "text_autoencoder", "t2i"
OBJECTIVE_FILE = "objective.safetensors"
JOINT = "extra_losses.0.autoencoder."
"""Prefix of the text autoencoder's weights among those of the objective, when it is trained with the flow."""
NUM_FOR_REPORT = 256
"""Validation captions on which the text autoencoder is evaluated."""
NUM_FOR_TEXT = 20_000
"""Items whose captions the text autoencoder is trained on."""


@dataclass(frozen=True)
class CaptionParts(Parts[CaptionConfig]):
    """How pictures and captions are read: image codec, text autoencoder, and perhaps the t2i run that is run backwards.

    codec and text are None in an outline, text also where only frozen networks are open; text_report: how well captions
    survive the text autoencoder, known where it was trained.
    """

    codec: Codec | None = None
    text: TextAutoencoder | None = None
    origin: Origin | None = None
    text_report: TextReport | None = None
    is_joint: bool = False

    @classmethod
    def learn(cls, config: CaptionConfig, examples: Examples, report: Report) -> Self:
        """Opens the codec or the t2i run, and trains the text autoencoder on the training captions."""
        settings = config.caption
        if settings.t2i is None and config.train.steps == 0:
            raise UserError(
                "train.steps=0 trains no flow, so there would be nothing to caption with: set caption.t2i to the "
                "directory of a t2i run, which is then run backwards, or train.steps."
            )
        captions = list(examples.captions(NUM_FOR_TEXT))
        torch.manual_seed(key("text autoencoder", config.seed))
        if settings.t2i is not None:
            origin = Origin.open(settings.t2i, config.data.image_size)
            codec: Codec = origin.codec
            text: TextAutoencoder = SourceText.of(origin, captions, settings.vocab_size, settings.autoencoder)
        else:
            origin, codec = (
                None,
                open_codec(config.codec, first_pictures(examples, config.data.image_size, config.codec.factor)),
            )
            tokenizer = build_tokenizer(captions, settings.vocab_size, settings.autoencoder.max_length)
            text = TextAutoencoder(tokenizer, codec.latent_shape(config.data.image_size), settings.autoencoder)
        device = distributed.device()
        text.to(device)
        if origin is not None:
            origin.to(device)
        cls._fit(config, text, captions, report)
        validation = Adapter.dataset(config, "val", limit=NUM_FOR_REPORT)
        quality = text.evaluate(list(validation.captions())[:NUM_FOR_REPORT], seed=config.seed)
        report(
            f"text autoencoder: {quality.token_accuracy:.2%} of tokens and {quality.exact_match:.2%} of validation "
            f"captions come back; latent mean {quality.latent_mean:.2f}, standard deviation {quality.latent_std:.2f}, "
            f"spread {quality.spread:.2f}."
        )
        return cls(codec, text, origin, quality, settings.joint)

    @staticmethod
    def _fit(config: CaptionConfig, text: TextAutoencoder, captions: Sequence[str], report: Report) -> None:
        settings = config.caption
        training = TextTraining(
            steps=settings.text_steps,
            batch_size=settings.text_batch_size,
            lr=settings.text_lr,
            seed=config.seed,
            precision="bf16" if config.train.precision == "bf16" else "no",
        )
        report(f"Training the text autoencoder on {len(captions)} captions, {text.vocab_size} tokens.")
        text.fit(
            captions,
            training,
            progress=lambda step, losses: report(
                f"text autoencoder {step}/{settings.text_steps}: loss {losses['loss']:.3f}, "
                f"training tokens right {losses['token_accuracy']:.3f}"
            ),
        )

    @classmethod
    def load(cls, config: CaptionConfig, folder: Path) -> Self:
        """Reads the codec or the t2i run, and the text autoencoder as far as it was trained."""
        if config.caption.t2i is not None:
            origin = Origin.open(str(folder / T2I_FOLDER), config.data.image_size)
            return cls(origin.codec, SourceText.load(folder / TEXT_FOLDER).attach(origin), origin)
        text = TextAutoencoder.load(folder / TEXT_FOLDER).requires_grad_(config.caption.joint)
        path = folder / OBJECTIVE_FILE
        if config.caption.joint and path.is_file():
            # What was saved before the flow is where its joint training began.
            tensors = {
                name.removeprefix(JOINT): value for name, value in read_tensors(path).items() if name.startswith(JOINT)
            }
            text.load_state_dict(tensors)
        return cls(read_codec(folder), text, is_joint=config.caption.joint)

    def save(self, folder: Path) -> None:
        """Writes the codec, the text autoencoder, and the t2i run if there is one."""
        assert self.codec is not None
        assert self.text is not None
        if self.origin is not None:
            self.origin.save(folder / T2I_FOLDER)
        self.codec.save(folder / FOLDER)
        self.text.save(folder / TEXT_FOLDER)
        if self.text_report is not None:
            write_atomically(folder / TEXT_FOLDER / "report.json", json.dumps(asdict(self.text_report), indent=1))

    @classmethod
    def frozen(cls, config: CaptionConfig) -> Self:
        """The codec, or the t2i run with its codec."""
        if config.caption.t2i is not None:
            origin = Origin.open(config.caption.t2i, config.data.image_size)
            return cls(origin.codec, origin=origin)
        return cls(unscaled_codec(config.codec))

    @classmethod
    def outline(cls, config: CaptionConfig) -> Self:
        """Nothing: the settings determine the latent shape."""
        return cls()

    def files(self) -> tuple[str, ...]:
        """The objective's weights hold the text autoencoder that was trained with the flow."""
        return (OBJECTIVE_FILE,) if self.is_joint else ()


class Adapter(Task[CaptionConfig, CaptionParts]):
    """Captions from pictures of any size, whose centre square is read."""

    name = "caption"
    hub_tag = "image-to-text"
    Config = CaptionConfig
    Parts = CaptionParts
    Scoring = CaptionScoring
    needs = frozenset({"image", "captions"})
    reads_features = True
    input_kind = "image"
    flow_alone = ("caption.reading=0", "caption.joint=false")
    quick = ("caption.text_steps=2",)

    @classmethod
    def backwards(cls, settings: Mapping[str, Any], other: AnyConfig, run: str) -> dict[str, Any]:
        """Those of captioning by a t2i run backwards, which trains a text decoder alone."""
        if other.task != "t2i":
            return super().backwards(settings, other, run)
        size, shape = settings.get("data", {}).get("image_size", DataConfig().image_size), other.data.image_size
        if size != shape or other.source.kind == "gaussian":
            differ = f"data.image_size is {shape} for t2i and {size} for caption"
            raise UserError(
                "t2i and caption are two directions of one flow only where their latents agree: "
                f"{differ if size != shape else 'with source.kind=gaussian t2i starts from noise, not from a text'}. "
                "Change that, or leave out directions.caption."
            )
        changes = {
            "caption": {"t2i": run, "reading": 0, "joint": False},
            "source": {"kind": "deterministic"},
            "train": {"steps": 0},
        }
        return merge(settings, changes)

    @property
    def codec(self) -> Codec:
        """Of the pictures."""
        assert self.parts.codec is not None, "an outline has no codec"
        return self.parts.codec

    @property
    def text(self) -> TextAutoencoder:
        """Captions <-> latents."""
        assert self.parts.text is not None, "an outline has no text autoencoder"
        return self.parts.text

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The codec, the text autoencoder, and those of the t2i run."""
        origin = self.parts.origin
        more = () if origin is None else (origin.model, *origin.task.networks)
        return tuple(network for network in (self.parts.codec, self.parts.text, *more) if network is not None)

    @property
    def reads_trained_weights(self) -> bool:
        """Whether the text autoencoder, which makes the targets, is trained with the flow."""
        return self.config.caption.joint

    def to(self, device: torch.device | str, *, offload: bool = False) -> Self:
        """Also says to the t2i run, whose source encoder reads the captions, where it computes."""
        if self.parts.origin is not None:
            self.parts.origin.task.device = torch.device(device)
        return super().to(device, offload=offload)

    def extractor(self, options: Options) -> Extractor:
        """Of the pictures alone: captions are read by a text autoencoder that is trained."""
        return Extractor(options, codec=self.codec)

    def accept(self, examples: Examples) -> None:
        """Raises UserError also where validation would have no pictures to caption."""
        super().accept(examples)
        val = self.config.data.val
        if "image" not in examples.reader.fields and (val is None or val.startswith("cache:")):
            raise UserError(NO_PICTURES)

    # -- the model

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """That of the image codec."""
        if self.parts.codec is None:
            return assumed_shape(self.config.codec, self.config.data.image_size)
        return self.parts.codec.latent_shape(self.config.data.image_size)

    @property
    def _pad(self) -> int:
        return self.text.tokenizer.pad_token_id

    def build_model(self) -> CrossFlow:
        """A source encoder on image latents and the backbone; or the flow of the t2i run, backwards."""
        if self.parts.origin is not None:
            return self.parts.origin.backwards()
        config, shape = self.config, self.latent_shape
        trunk = None
        if config.source.kind != "gaussian":
            trunk = build_trunk(config.source, shape[0], config.backbone.patch, config.caption.conv_stem)
        source = SourceEncoder(trunk, config.source.kind, shape, config.source.noise_scale)
        grid_channels = shape[0] if config.source.conditions else 0
        return CrossFlow(source, build_backbone(config.backbone, shape, grid_channels=grid_channels))

    def build_objective(self, model: CrossFlow) -> Objective:
        """The losses, with those of `objective` that the settings name."""
        shape = self.latent_shape
        return Objective(
            model,
            self.config,
            alignment_head=BagOfTokens(self.text.vocab_size, self._pad, math.prod(shape)),
            reconstructor=Reconstructor(shape[0], shape[0]),
            extra_losses=self._extra_losses(),
        )

    def _extra_losses(self) -> ExtraLosses:
        settings = self.config.caption
        losses: list[nn.Module] = [TextLoss(self.text, self._pad)] if settings.joint else []
        if settings.reading and self.config.source.kind != "gaussian":  # such a source says nothing to read
            losses.append(ReadingLoss(self.text, settings.reading))
        return ExtraLosses(losses)

    # -- data

    @classmethod
    def transform(cls, config: CaptionConfig, item: Item, generator: np.random.Generator, augment: bool) -> Example:
        """Without augmentation, too, the caption is drawn: each is as good a target of the picture."""
        return captioned_example(item, config.data.image_size, generator, caption=config.caption.captions.which)

    def collate(self, examples: Sequence[Example]) -> Record:
        """Captions as tokens, pictures as pixels or as the moments of a cache."""
        tokens, mask = self.text.tokens([example["caption"] for example in examples])
        pictures = collate_pictures(self.codec, examples, cached_batch(examples, self.config.data.image_size))
        return {"ids": tuple(example["id"] for example in examples), "tokens": tokens, "mask": mask, **pictures}

    def batch(self, record: Record) -> Batch:
        """Image latents as features, text latents as target, token ids as alignment."""
        source = self._source(latents(self.codec, record))
        return Batch(
            features=source.features,
            target=self.text.encode_tokens(record["tokens"], record["mask"]).mean,
            condition=source.condition,
            alignment=source.features if self.config.loss.encoder == "reconstruction" else record["tokens"],
            ids=record["ids"],
        )

    def _source(self, latents: Tensor) -> Source:
        return Source(latents, condition=Condition(grid=latents) if self.config.source.conditions else None)

    # -- sampling

    def pieces(self, value: np.ndarray) -> Pieces:
        """The centre square of a picture uint8 (H, W, 3), at the model's size."""
        return Pieces([center_crop_resize(value, self.config.data.image_size)])

    def source(self, values: Sequence[np.ndarray]) -> Source:
        """Pictures uint8 (S, S, 3) at the model's size."""
        return self.as_source(to_tensors(values).to(self.device))

    def as_source(self, inputs: Tensor, mask: Tensor | None = None) -> Source:
        """Pictures (B, 3, H, W) in [-1, 1] as latents."""
        return self._source(self.codec.encode(inputs).mean)

    def decode(self, z1: Tensor, features: Tensor | None = None) -> list[str]:
        """Captions."""
        return self.text.decode(z1)

    def decoded(self, z1: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of the tokens."""
        return self.text.logits(z1)

    def target(self, value: str | Path | np.ndarray) -> Pieces:
        """The latent of a caption."""
        return Pieces(list(self.text.encode([str(value)]).mean))

    def pictures(self, outputs: Sequence[str]) -> list[np.ndarray]:
        """None: captions are no pictures."""
        return []

    def write_output(self, output: str, stem: Path, metadata: Mapping[str, Any]) -> list[Path]:
        """Writes a caption as a text file."""
        return [write_atomically(stem.with_name(f"{stem.name}.txt"), output + "\n")]
