"""Flow backbones: velocity networks (z_t, t, unconditional, condition) -> velocities, coarse to fine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from crossflow.core.backbones import dimr, dit
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError
from crossflow.core.registry import Registry


@dataclass(frozen=True)
class Backbone:
    """A kind of backbone: how it is built from its configuration, and its named sizes.

    Attributes:
        build: (config, latent_shape, *, context_dim, grid_channels) -> module; see `build_backbone`.
        sizes: name of a size -> its depth, width and heads.
    """

    build: Callable[..., nn.Module]
    sizes: Mapping[str, dit.Size | dimr.Size]


BACKBONES: Registry[Backbone] = Registry("backbone")
BACKBONES.register("dit")(Backbone(dit.build_dit, dit.SIZES))
BACKBONES.register("dimr")(Backbone(dimr.build_dimr, dimr.SIZES))


def build_backbone(
    config: BackboneConfig, latent_shape: tuple[int, ...], *, context_dim: int | None = None, grid_channels: int = 0
) -> nn.Module:
    """The backbone `config.name` for latents (C, H, W) or (N, C).

    context_dim: width of the condition's tokens, None without cross-attention; grid_channels: channels of its grid.
    Raises UserError for an unknown name or size, for sizes that do not fit each other or the latent, and for a flow map
    of a backbone that knows no jumps.
    """
    build = BACKBONES.get(config.name).build
    network: nn.Module = build(config, latent_shape, context_dim=context_dim, grid_channels=grid_channels)
    if config.interval != "none" and not getattr(network, "jumps", False):
        raise UserError(
            f"backbone.interval = {config.interval} makes a flow map, and the backbone {config.name} knows no jumps. "
            "Use dit or dimr, or crossflow distill --method reflow."
        )
    return network
