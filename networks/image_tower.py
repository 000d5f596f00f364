"""The frozen image tower of the contrastive encoder loss (SigLIP ViT-L/16-256 in the released training): pictures ->
embeddings (B, D). It belongs to the training recipe, never to the generator.

Towers are loaded by hub id or folder: SigLIP and CLIP vision networks through transformers, others through timm. A
random tower raises no error in training, so an untrained one is refused unless `allow_random` is set, and the checksum
is logged. B batch, D width.
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
from crossflow.networks.frozen import Frozen, expect_checksum, freeze, load_frozen, load_public, weights_checksum

logger = logging.getLogger(__name__)

FILES = "config.json and model.safetensors"
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
SIGLIP_STATISTICS: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
CLIP_STATISTICS: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class TowerSettings(Section):
    """The image tower of a recipe: a frozen one by `source`, or a small one trained with the model."""

    source: str | None = None
    """Hub id or folder of a frozen image tower (SigLIP, CLIP, or a timm network); none, and no width: a small one is
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
        """Whether the recipe has a frozen tower."""
        return self.source is not None or self.width is not None


class ImageTower(Frozen):
    """Pictures (B, 3, H, W) float32 in [-1, 1] -> embeddings (B, width) float32, without gradient.

    network: normalised pictures (B, 3, size, size) -> (B, width); statistics: mean and standard deviation per channel
    of pictures in [0, 1], by which they are normalised. Load one by `ImageTower.load`.

        tower = ImageTower.load(TowerSettings(source="google/siglip-large-patch16-256"))
        embedding = tower(pictures)  # (B, 1024)
    """

    def __init__(self, network: nn.Module, size: int, statistics: Statistics, width: int) -> None:
        super().__init__()
        self.network = freeze(network).float()
        self.size, self.width = size, width
        self.statistics = tuple(torch.tensor(values)[:, None, None] for values in statistics)
        self.checksum = weights_checksum(network)
        self.eval()

    @classmethod
    def load(cls, settings: TowerSettings, checksum: str | None = None) -> Self:
        """The tower at `settings.source`. checksum: SHA-256 that its weights must have, None accepts any.

        Raises UserError when it is unavailable, of an unknown kind, incomplete, untrained, or its weights differ.
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
                f"The image tower {source!r} was never trained: all its norms have their initial values, so its "
                "embeddings are meaningless. Give a trained one, or set tower.allow_random=true to use it anyway."
            )
        if settings.width not in (None, tower.width):
            raise UserError(
                f"tower.width = {settings.width}, but the embedding of {source!r} has width {tower.width}. Set "
                f"tower.width={tower.width}, or give another tower."
            )
        expect_checksum(source, tower.checksum, checksum)
        logger.info("image tower %s: weights sha256 %s", source, tower.checksum)
        return tower

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], resized to the tower's size -> (B, width) float32."""
        pixels = (images.float() + 1) / 2
        if pixels.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (values.to(pixels.device) for values in self.statistics)
        return self.network((pixels - mean) / std).float()


class _Pooled(nn.Module):
    """The pooled output of a transformers vision network."""

    def __init__(self, network: nn.Module, field: str) -> None:
        super().__init__()
        self.network, self.field = network, field

    def forward(self, pixels: Tensor) -> Tensor:
        return getattr(self.network(pixel_values=pixels), self.field)


def _network(source: str, allow_random: bool) -> tuple[nn.Module, int, Statistics, int]:
    """Network, size, statistics and width of the tower at `source`, the arguments of `ImageTower`."""
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
            f"An image tower must be a SigLIP, CLIP or timm network; {source!r} is a {config.model_type} network."
        )
    if allow_random and folder.is_dir() and not any(folder.glob("*.safetensors")):
        logger.warning("image tower %s has no weights: they are random, as tower.allow_random permits", source)
        network: Any = kind(vision)
    else:
        network = load_frozen(kind.from_pretrained, source, files=FILES)
    return _Pooled(network, field), vision.image_size, statistics, width or vision.hidden_size


def _timm_network(name: str, source: str, allow_random: bool) -> tuple[nn.Module, int, Statistics, int]:
    import timm

    def create(_: str) -> nn.Module:
        return timm.create_model(name, pretrained=True, num_classes=0)

    network: Any = load_public(create, source, files="config.json and model.safetensors of timm")
    config = network.pretrained_cfg
    return network, config["input_size"][-1], (config["mean"], config["std"]), network.num_features


def _untrained(network: nn.Module) -> bool:
    """Whether every norm still has its initial values; training changes each of them."""
    initial = [norm_is_initial for module in network.modules() for norm_is_initial in _initial_norm(module)]
    return bool(initial) and all(initial)


def _initial_norm(module: nn.Module) -> Iterator[bool]:
    """Of a norm, whether its running statistics (mean 0, variance 1) are initial; without statistics, its parameters
    (weight 1, bias 0), if it has any. Nothing for other modules.
    """
    if not isinstance(module, NORMS):
        return
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is not None and variance is not None:
        yield not mean.any() and bool((variance == 1).all())
    elif module.weight is not None:
        yield bool((module.weight == 1).all()) and (module.bias is None or not module.bias.any())
