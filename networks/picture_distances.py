"""Distances between pictures that can be differentiated. B batch, C channels, H W height width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import read_tensors
from crossflow.networks.frozen import Frozen, weights_checksum
from crossflow.networks.timm_networks import Read, timm_network

WINDOW = 11
"""Side of the window of SSIM, in pixels."""
NAMES = ("l1", "ssim", "features")


def picture_distance(name: str, network: str | None = None) -> nn.Module:
    """l1, ssim, or features by `network` (see `FeatureDistance`): (a, b) (B, 3, H, W) in [-1, 1] -> (B,).

    Raises UserError for an unknown name or network.
    """
    if name not in NAMES:
        raise unknown_name("distance between pictures", name, NAMES)
    if name == "features":
        assert network is not None, "the distance of features needs a network"
        return FeatureDistance(network)
    return L1Distance() if name == "l1" else SsimDistance()


class L1Distance(nn.Module):
    """Mean absolute difference."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (B, C, H, W) -> (B,)."""
        return (a.float() - b.float()).abs().flatten(1).mean(1)


class SsimDistance(nn.Module):
    """1 - structural similarity (Wang et al. 2004), averaged over channels and pixels."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (B, C, H, W) in [-1, 1] -> (B,), 0 for equal pictures."""
        from kornia.metrics import ssim

        with torch.autocast(a.device.type, enabled=False):
            return 1 - ssim((a.float() + 1) / 2, (b.float() + 1) / 2, WINDOW).flatten(1).mean(1)


class FeatureDistance(Frozen):
    """Squared distance of the features of a classifier, in the manner of LPIPS (Zhang et al. 2018) without its learned
    weights: features have unit length at each position, squares are summed over channels, averaged over positions and
    then over the stages of the network.

    source: see `timm_network`, with networks of stages such as ResNet, VGG and ConvNeXt. Raises UserError.

    >>> distance = FeatureDistance("timm:test_resnet@random")
    >>> pictures = torch.rand(2, 3, 32, 32)
    >>> distance(pictures, pictures)
    tensor([0., 0.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str, read: Read = read_tensors) -> None:
        super().__init__()
        import timm

        self.network = timm_network(source, read)
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"The network {source} does not show features of its stages; use a ResNet or ConvNeXt.")
        settings = timm.data.resolve_data_config({}, model=self.network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(1, 3, 1, 1), persistent=False)
        self.checksum = weights_checksum(self.network)
        self.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (B, 3, H, W) in [-1, 1], clamped to it -> (B,), at least 0."""
        pixels = (torch.cat([a, b]).float().clamp(-1, 1) + 1) / 2
        stages = self.network.forward_intermediates((pixels - self.mean) / self.std, intermediates_only=True)
        differences = []
        for features in stages:
            first, second = F.normalize(features.float(), dim=1, eps=1e-6).chunk(2)
            differences.append((first - second).square().sum(1).flatten(1).mean(1))
        return torch.stack(differences).mean(0)
