"""Source encoder of captioning: an image's latent -> posterior over a text latent of the same shape. V vocabulary."""

from torch import Tensor, nn

from crossflow.core.config import SourceConfig
from crossflow.networks.trunks import PatchTrunk, PatchTrunkSettings


def build_trunk(config: SourceConfig, channels: int, patch: int, conv_stem: bool) -> nn.Module:
    """Image latents (B, C, H, W) -> (B, 2, C, H, W)."""
    # The mean starts well above the deviation: a flow reads the picture from z0 alone.
    settings = PatchTrunkSettings(
        width=config.width, depth=config.depth, patch=patch, mean_std=0.1, log_var=-2.0, conv_stem=conv_stem
    )
    return PatchTrunk(channels, channels, settings)


class BagOfTokens(nn.Module):
    """Token ids (B, N) -> (B, num_values): what the contrastive loss compares z0 with. Padding counts nothing."""

    def __init__(self, vocab_size: int, pad: int, num_values: int, width: int = 256) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab_size, width, padding_idx=pad)
        self.mlp = nn.Sequential(nn.Linear(width, 512), nn.SiLU(), nn.Linear(512, num_values))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) -> (B, num_values)."""
        return self.mlp(self.bag(ids))
