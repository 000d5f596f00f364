"""Source encoder of super-resolution: the bicubic enlargement itself, with a learned variance if the source is
variational.
"""

from torch import nn

from crossflow.core.source import SourceKind
from crossflow.networks.trunks import IdentityTrunk


def build_trunk(kind: SourceKind) -> nn.Module | None:
    """Latents of the bicubic picture (B, 3, H, W) -> (B, 2, 3, H, W); None for the gaussian source."""
    return None if kind == "gaussian" else IdentityTrunk(3, variational=kind == "variational")
