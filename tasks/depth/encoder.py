"""Source encoder of depth estimation: RGB (B, 3, H, W) -> posterior over (B, 1, H, W)."""

from torch import nn

from crossflow.core.config import BackboneConfig, SourceConfig
from crossflow.networks.trunks import PatchTrunk, PatchTrunkSettings


def build_trunk(config: SourceConfig, backbone: BackboneConfig, image_size: int) -> nn.Module:
    """RGB (B, 3, H, W) in [-1, 1] -> (B, 2, 1, H, W), any H and W that are multiples of the backbone's patch; rotary
    positions where the backbone has them. image_size: side of the training pictures in pixels.
    """
    side = image_size // backbone.patch
    settings = PatchTrunkSettings(
        width=config.width,
        depth=config.depth,
        patch=backbone.patch,
        positions="rotary" if backbone.positions == "rotary" else "sincos",
        trained_grid=(side, side),
        log_var=-2.0,
    )
    return PatchTrunk(3, 1, settings)
