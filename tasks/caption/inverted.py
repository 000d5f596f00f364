"""Captioning by a text-to-image model run backwards: its source latents are the text latents, a decoder is trained
to read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from crossflow.core.backbones.time_reversal import TimeReversal
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.source import Posterior, SourceEncoder
from crossflow.networks.codecs.base import Codec
from crossflow.networks.hub import run_folder
from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.networks.trunks import IdentityTrunk
from crossflow.tasks import load_model, save_model
from crossflow.tasks.base import Task
from crossflow.tasks.caption.decoder import TextAutoencoder, TextAutoencoderConfig


@dataclass(frozen=True)
class Origin:
    """A trained text-to-image task and its model, to be run backwards."""

    task: Task
    model: CrossFlow

    @classmethod
    def open(cls, source: str, image_size: int) -> Self:
        """The run directory, or hub repository, `source`, for pictures of `image_size` pixels.

        Raises UserError for a run of another task or size, or one whose backbone reads the text.
        """
        task, model = load_model(run_folder(source))
        if task.name != "t2i":
            raise UserError(f"caption.t2i = {source} is a {task.name} run; give the directory of a t2i run.")
        if task.config.source.conditions:
            raise UserError(
                f"caption.t2i = {source} has a backbone that reads the text (source.kind = "
                f"{task.config.source.kind}, source.condition = {str(task.config.source.condition).lower()}), so its "
                "flow cannot be followed backwards without one. Give a run whose text is in the source alone."
            )
        size = task.config.data.image_size
        if size != image_size:
            raise UserError(
                f"The t2i run sees pictures of {size} pixels; set data.image_size={size} "
                f"to run it backwards (it is {image_size})."
            )
        return cls(task, model.eval())

    def to(self, device: torch.device | str) -> None:
        """Moves the task and the model."""
        self.task.to(device)
        self.model.to(device)

    @property
    def codec(self) -> Codec:
        """The image codec of the run."""
        codec: Codec = self.task.parts.codec
        return codec

    def backwards(self) -> CrossFlow:
        """The flow from an image's latent to the text's."""
        shape = self.task.latent_shape
        source = SourceEncoder(IdentityTrunk(shape[0], variational=False), "deterministic", shape)
        return CrossFlow(source, TimeReversal(self.model.backbone))

    def save(self, folder: Path) -> None:
        """Writes the run directory that `open` reads."""
        save_model(self.task, self.model, folder)


class SourceText(TextAutoencoder):
    """A text autoencoder whose encoder is the source encoder of a text-to-image run; only the decoder is trained.

    The run is not part of the module's state: it is kept beside it.
    """

    def attach(self, origin: Origin) -> Self:
        """Gives it the run whose texts it reads."""
        self.__dict__["origin"] = origin  # not a submodule
        self.encoder.requires_grad_(False)
        return self

    @classmethod
    def of(cls, origin: Origin, captions: Sequence[str], vocab_size: int, config: TextAutoencoderConfig) -> Self:
        """A new one, with the run's tokenizer, or one built from the captions when the run has a frozen text
        encoder.
        """
        tokenizer: Any = origin.task.parts.text.tokenizer
        if tokenizer is None:
            tokenizer = build_tokenizer(captions, vocab_size, config.max_length)
        # These latents are given, not drawn from a code, so each patch of them has to be read.
        patches = config.model_copy(update={"layout": "patches"})
        return cls(tokenizer, origin.task.latent_shape, patches).attach(origin)

    @torch.no_grad()
    def posterior(self, ids: Tensor, mask: Tensor) -> Posterior:
        """The posterior of the run's source encoder over the texts of ids (B, N)."""
        origin: Origin = self.__dict__["origin"]
        source = origin.task.source(self._texts(ids))
        posterior = origin.model.source_encoder(source.features, source.mask)
        if posterior.log_var is None:
            return Posterior(posterior.mean, torch.full_like(posterior.mean, -20.0))
        return posterior

    def measure_statistics(self, captions: Sequence[str], most: int = 2048) -> None:
        """Does nothing: the latents are the flow's own and are not scaled."""
