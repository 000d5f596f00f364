"""Flow backbones: velocity networks (z_t, t, unconditional) -> velocities, coarse to fine."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from crossflow.core.config import BackboneConfig
from crossflow.core.registry import Registry

BACKBONES: Registry[Callable[..., nn.Module]] = Registry("backbone")


def build_backbone(
    config: BackboneConfig, latent_shape: tuple[int, ...], *, context_dim: int | None = None, grid_channels: int = 0
) -> nn.Module:
    """The backbone that `config` names, for latents (C, H, W) or (N, C).

    context_dim: width of the condition's tokens, None without cross-attention; grid_channels: channels of its grid.
    """
    _enter()
    return BACKBONES.get(config.name)(config, latent_shape, context_dim=context_dim, grid_channels=grid_channels)


def size_tables() -> dict[str, Mapping[str, Any]]:
    """The table SIZES of each backbone: name of the size -> its depth, width and heads."""
    _enter()
    return {name: sys.modules[BACKBONES.get(name).__module__].SIZES for name in BACKBONES.names()}


def _enter() -> None:
    """The backbones enter the registry; here, because they import it."""
    from crossflow.core.backbones import dimr, dit  # noqa: F401
