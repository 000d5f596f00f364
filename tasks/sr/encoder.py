"""Source encoder of super-resolution that corrects the enlarged picture."""

from torch import nn

from crossflow.core.config import SourceConfig
from crossflow.networks.trunks import PatchTrunkSettings, ResidualTrunk


def build_residual(config: SourceConfig, patch: int) -> nn.Module:
    """Enlarged pictures (B, 3, H, W) as latents -> (B, 2, 3, H, W), any H and W that are multiples of the patch."""
    # Without positions, because pictures are cut into tiles that are larger than the training crops.
    settings = PatchTrunkSettings(config.width, config.depth, patch, positions="none", log_var=-6.0)
    return ResidualTrunk(3, settings)
