"""The settings of captioning."""

from typing import Self

from pydantic import Field, model_validator

from crossflow.core.config import Config, Section
from crossflow.data.image_latents import CodecSettings
from crossflow.tasks.caption.layouts import TextAutoencoderConfig


class Captions(Section):
    """Which captions are trained on."""

    which: int | None = Field(None, ge=0)
    """Train on this caption of each item (0 = the first, or the last there is) instead of a random one each epoch."""


class CaptionSettings(Section):
    """What is specific to captioning: the text autoencoder, and what the source is trained on."""

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
    """The configuration of a captioning run."""

    codec: CodecSettings = CodecSettings()
    caption: CaptionSettings = CaptionSettings()

    @model_validator(mode="after")
    def _losses_fit(self) -> Self:
        target, loss, joint = self.loss.encoder_target, self.loss.encoder, self.caption.joint
        if loss != "none" and target not in ("image", "text"):
            raise ValueError(f"loss.encoder_target = {target!r} is not possible for captioning; it is image or text.")
        if loss in ("contrastive", "sigmoid") and target == "image":
            raise ValueError(
                "Captioning aligns z0 with the caption: set loss.encoder_target=text, or "
                "loss.encoder=reconstruction for the image."
            )
        if loss == "reconstruction" and target == "text":
            raise ValueError(
                "The source of captioning is an image, so loss.encoder=reconstruction needs loss.encoder_target=image."
            )
        if joint and loss == "reconstruction":
            raise ValueError(
                "caption.joint goes with loss.encoder=contrastive or none; reconstruction "
                "takes the place of the token ids."
            )
        if self.caption.reading and (loss == "reconstruction" or self.caption.t2i is not None):
            raise ValueError(
                f"caption.reading = {self.caption.reading:g} trains a source encoder to be read as text, which goes "
                "neither with loss.encoder=reconstruction nor with caption.t2i: set caption.reading=0."
            )
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> Self:
        joint, t2i = self.caption.joint, self.caption.t2i
        if t2i is not None and (joint or self.source.kind != "deterministic"):
            raise ValueError(
                "A t2i run backwards starts at the image itself: set source.kind=deterministic, "
                "and leave out caption.joint."
            )
        return self
