"""The settings of text-to-image."""

from typing import Self

from pydantic import Field, model_validator

from crossflow.core.config import Config, Section
from crossflow.data.image_latents import CodecSettings
from crossflow.networks.image_tower import TowerSettings
from crossflow.tasks.t2i.encoder import TextSettings


class T2ISettings(Section):
    """What is specific to text-to-image: which captions are learned from, and how pictures of other data are scored."""

    clip: str | None = None
    """Hub id or folder of a CLIP model for the CLIP score; none: pictures of other data than scenes are not scored."""
    first_caption: float = Field(0.0, ge=0, le=1)
    """Chance that training takes an item's first caption, and otherwise one of all. In scenes the first is short, as
    prompts are, and often leaves the colours open.
    """


class T2IConfig(Config):
    """The configuration of a text-to-image run."""

    text: TextSettings = TextSettings()
    codec: CodecSettings = CodecSettings()
    tower: TowerSettings = TowerSettings()
    t2i: T2ISettings = T2ISettings()

    @model_validator(mode="after")
    def _aligns_with_something(self) -> Self:
        loss = self.loss
        if loss.encoder != "none" and loss.encoder_target not in ("image", "text", "tokens"):
            raise ValueError(
                f"loss.encoder_target = {loss.encoder_target!r} is not possible for t2i; it is image, text or tokens."
            )
        return self
