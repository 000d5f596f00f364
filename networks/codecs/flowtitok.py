"""FlowTiTok as a codec: latents are tokens, and pictures are decoded with the features of their text."""

from pathlib import PurePosixPath
from typing import ClassVar

from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.source import Posterior
from crossflow.networks.codecs.base import PerChannel
from crossflow.networks.codecs.flowtitok_network import CONFIG_FILE, WEIGHTS_FILE, FlowTiTok
from crossflow.networks.codecs.network import NetworkCodec
from crossflow.networks.frozen import public_folder


class FlowTiTokCodec(NetworkCodec):
    """The released tokenizer: latents are tokens (B, 77, 16), and a picture is decoded with its text's features.

    scale: 1 by default; the FlowTok models multiply the tokens by 1.0143. Pictures are in [-1, 1] as in any codec, even
    if the network's own range is [0, 1].
    """

    kind = "flowtitok"
    sources = "the folder that `crossflow convert` wrote from the released tokenizer, or a hub id of such a folder"
    channel_axis: ClassVar[int] = -1
    reads_text: ClassVar[bool] = True
    has_spread: ClassVar[bool] = True
    network: FlowTiTok

    def __init__(
        self,
        network: FlowTiTok,
        scale: PerChannel | None = None,
        shift: PerChannel | None = None,
        chunk: int = 8,
    ) -> None:
        config = network.config
        super().__init__(
            network,
            config.channels,
            config.patch,
            1.0 if scale is None else scale,
            0.0 if shift is None else shift,
            chunk,
        )

    @classmethod
    def _load(cls, source: str, subfolder: str) -> FlowTiTok:
        files = [str(PurePosixPath(subfolder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return FlowTiTok.from_pretrained(public_folder(source, files) / subfolder)

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, ...]:
        """(77, 16) for the image size that the tokenizer was trained on. Raises UserError for any other."""
        config = self.network.config
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if sides != (config.image_size, config.image_size):
            raise UserError(
                f"This FlowTiTok codec takes pictures of {config.image_size} x {config.image_size} pixels, got "
                f"{sides[0]} x {sides[1]}. Set data.image_size={config.image_size}."
            )
        return config.num_tokens, config.channels

    def _encode(self, x: Tensor) -> Posterior:
        return Posterior(*self.network.encoder((x + 1) / 2 if self.network.config.pixels == "unit" else x))

    def _decode(self, raw: Tensor, text_features: Tensor | None = None) -> Tensor:
        config = self.network.config
        assert text_features is not None
        if text_features.shape[1:] != (config.num_tokens, config.text_width):
            raise UserError(
                f"FlowTiTok expects text features of {config.num_tokens} x {config.text_width} (CLIP ViT-L/14, "
                f"padded), got {tuple(text_features.shape[1:])}."
            )
        pictures = self.network.decoder(raw, text_features)
        return 2 * pictures - 1 if config.pixels == "unit" else pictures
