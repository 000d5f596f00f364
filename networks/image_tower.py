"""The frozen image tower of the contrastive encoder loss (SigLIP ViT-L/16-256 in the released training): pictures ->
embeddings (B, D). It belongs to the training recipe, never to the generator.

Towers are found by hub id or folder: SigLIP and CLIP vision networks through transformers, others through timm. A tower
on random weights trains without complaint, so its checksum is logged and an untrained one is refused unless asked for.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossflow.core.config import Section
from crossflow.core.errors import UserError
from crossflow.networks.frozen import expect_checksum, freeze, load_frozen, load_public, weights_checksum

logger = logging.getLogger(__name__)

FILES = "config.json and model.safetensors"
SIGLIP_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class TowerSettings(Section):
    source: str | None = None
    """Hub id or folder of a frozen image tower (SigLIP, CLIP; or a timm network); none, and no width: a small one is
    trained with the model.
    """
    width: int | None = Field(None, ge=1)
    """Width of the frozen tower's embedding, checked when it is loaded; lets the model be built without it."""
    head: Literal["mlp", "adaptor"] = "mlp"
    """From embedding to latent: an MLP (released, 256 px), or linear maps and convolutions (released, 512 px)."""
    allow_random: bool = False
    """Accept a tower whose weights are missing or were never trained."""

    @property
    def frozen(self) -> bool:
        return self.source is not None or self.width is not None


class ImageTower(nn.Module):
    """Pictures (B, 3, H, W) float32 in [-1, 1] -> embeddings (B, width) float32, without gradient."""

    def __init__(
        self, network: nn.Module, size: int, statistics: tuple[tuple[float, ...], tuple[float, ...]], width: int
    ) -> None:
        super().__init__()
        self.network = freeze(network).float()
        self.size, self.width = size, width
        self.statistics = tuple(torch.tensor(values)[:, None, None] for values in statistics)
        self.checksum = weights_checksum(network)
        self.eval()

    @classmethod
    def load(cls, settings: TowerSettings, checksum: str | None = None) -> Self:
        """The tower that `settings` name. checksum: SHA-256 its weights must have, None accepts any.

        Raises UserError when it cannot be had, is of another kind, lacks weights, or was never trained.
        """
        source = settings.source
        if source is None:
            raise UserError(
                "The contrastive loss of this recipe compares with a frozen image tower: set tower.source to the "
                "hub id or folder of one, such as google/siglip-large-patch16-256."
            )
        tower = cls(*_network(source, settings.allow_random))
        if _untrained(tower.network) and not settings.allow_random:
            raise UserError(
                f"The image tower {source!r} was never trained: all its norms are as they start, so its embeddings say "
                "nothing of a picture. Give a trained one, or set tower.allow_random=true to use it all the same."
            )
        if settings.width not in (None, tower.width):
            raise UserError(f"tower.width = {settings.width}, but the embedding of {source!r} is {tower.width} wide.")
        expect_checksum(source, tower.checksum, checksum)
        logger.info("image tower %s: weights sha256 %s", source, tower.checksum)
        return tower

    def train(self, mode: bool = True) -> Self:
        """Does nothing but keep evaluation mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() + 1) / 2
        if pixels.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (values.to(pixels.device) for values in self.statistics)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network((pixels - mean) / std).float()


class _Pooled(nn.Module):
    """The pooled output of a transformers vision network."""

    def __init__(self, network: nn.Module, field: str) -> None:
        super().__init__()
        self.network, self.field = network, field

    def forward(self, pixels: Tensor) -> Tensor:
        return getattr(self.network(pixel_values=pixels), self.field)


def _network(source: str, allow_random: bool) -> tuple[nn.Module, int, Any, int]:
    """The arguments of `ImageTower` for the network at `source`."""
    import transformers

    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder.resolve())
        if (folder / "config.json").is_file() and "architecture" in json.loads((folder / "config.json").read_text()):
            return _timm_network(f"local-dir:{source}", source, allow_random)
    elif source.startswith(("timm/", "hf-hub:")):
        return _timm_network(f"hf-hub:{source.removeprefix('hf-hub:')}", source, allow_random)
    config: Any = load_public(transformers.AutoConfig.from_pretrained, source, files=FILES)
    vision = getattr(config, "vision_config", config)
    if config.model_type.startswith("siglip"):
        kind, field, statistics, width = transformers.SiglipVisionModel, "pooler_output", SIGLIP_STATISTICS, None
    elif config.model_type.startswith("clip"):
        kind, field, statistics = transformers.CLIPVisionModelWithProjection, "image_embeds", CLIP_STATISTICS
        width = vision.projection_dim
    else:
        raise UserError(
            f"{source!r} is a {config.model_type} network; image towers are SigLIP or CLIP, or networks of timm."
        )
    if allow_random and folder.is_dir() and not any(folder.glob("*.safetensors")):
        logger.warning("image tower %s has no weights: it runs on random ones, as tower.allow_random says", source)
        network: Any = kind(vision)
    else:
        network = load_frozen(kind.from_pretrained, source, files=FILES)
    return _Pooled(network, field), vision.image_size, statistics, width or vision.hidden_size


def _timm_network(name: str, source: str, allow_random: bool) -> tuple[nn.Module, int, Any, int]:
    import timm

    def create(_: str) -> nn.Module:
        return timm.create_model(name, pretrained=True, num_classes=0)

    network: Any = load_public(create, source, files="config.json and model.safetensors of timm")
    about = network.pretrained_cfg
    return network, about["input_size"][-1], (about["mean"], about["std"]), network.num_features


def _untrained(network: nn.Module) -> bool:
    """Whether every norm is as it starts: weight 1 and bias 0, or, of one that keeps statistics, mean 0 and variance 1.
    Training moves each of them.
    """
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    starts = [start for norm in network.modules() if isinstance(norm, kinds) for start in _at_start(norm)]
    return bool(starts) and all(starts)


def _at_start(norm: Any) -> Iterator[bool]:
    """Whether its statistics are as they start; of norms without any, whether its parameters are (if it has some)."""
    if getattr(norm, "running_mean", None) is not None:
        yield bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())
    elif norm.weight is not None:
        yield bool((norm.weight == 1).all()) and (norm.bias is None or bool((norm.bias == 0).all()))
