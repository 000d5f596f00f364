"""Captioning by a text-to-image model run backwards: its source latents are the text latents, a decoder is trained
to read them.
"""

from typing import Any

import torch
from torch import Tensor

from crossflow.core.backbones.time_reversal import TimeReversal
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.source import Posterior, SourceEncoder
from crossflow.engine.sample import Pipeline, load
from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.networks.trunks import IdentityTrunk
from crossflow.tasks.caption.decoder import TextAutoencoder, TextAutoencoderConfig


def load_t2i(source: str) -> Pipeline:
    """The text-to-image run to be inverted; raises UserError when it is another task's or starts from noise."""
    pipe = load(source)
    if pipe.task.name != "t2i":
        raise UserError(f"caption.t2i = {source} is a {pipe.task.name} run; give the directory of a t2i run.")
    if pipe.model.source_encoder.kind == "gaussian":
        raise UserError(
            f"caption.t2i = {source} starts from Gaussian noise, so its flow backwards does not lead to a text."
        )
    return pipe


def backwards(pipe: Pipeline) -> CrossFlow:
    """The flow from an image's latent to the text's."""
    shape = pipe.task.latent_shape
    source = SourceEncoder(IdentityTrunk(shape[0], variational=False), "deterministic", shape)
    return CrossFlow(source, TimeReversal(pipe.model.backbone))


class SourceText(TextAutoencoder):
    """A text autoencoder whose encoder is the source encoder of a text-to-image run; only the decoder is trained.

    The run is not part of the module's state: it is kept beside it.
    """

    def attach(self, pipe: Pipeline) -> "SourceText":
        """Gives it the run whose texts it reads."""
        self.__dict__["origin"] = pipe  # not a submodule
        self.encoder.requires_grad_(False)
        return self

    @classmethod
    def of(cls, pipe: Pipeline, captions: list[str], vocab_size: int, config: TextAutoencoderConfig) -> "SourceText":
        """A new one, with the run's tokenizer, or one built from the captions when the run has a frozen text
        encoder.
        """
        tokenizer: Any = pipe.task.text.tokenizer  # type: ignore[attr-defined]
        if tokenizer is None:
            tokenizer = build_tokenizer(captions, vocab_size, config.max_length)
        # These latents are given, not drawn from a code, so each patch of them has to be read.
        patches = config.model_copy(update={"layout": "patches"})
        return cls(tokenizer, pipe.task.latent_shape, patches).attach(pipe)

    @torch.no_grad()
    def posterior(self, ids: Tensor, mask: Tensor) -> Posterior:
        pipe: Pipeline = self.__dict__["origin"]
        source = pipe.task.source(self._texts(ids)).to(pipe.device)
        found = pipe.model.source_encoder(source.features, source.mask)
        mean = found.mean.to(ids.device)  # the run may be on a GPU, the decoder that learns to read it is not
        return Posterior(mean, torch.full_like(mean, -20.0) if found.log_var is None else found.log_var.to(ids.device))

    def measure_statistics(self, captions: Any, most: int = 2048) -> None:
        """Does nothing: the latents are the flow's own and are not scaled."""
