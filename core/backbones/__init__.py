"""Flow backbones: velocity networks (z_t, t, unconditional) -> velocities, coarse to fine."""

from collections.abc import Callable

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
    from crossflow.core.backbones import dimr, dit  # noqa: F401  (they enter the registry)

    return BACKBONES.get(config.name)(config, latent_shape, context_dim=context_dim, grid_channels=grid_channels)
