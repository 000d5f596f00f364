"""Heads of the contrastive encoder loss: what z0 is compared with, brought to the size of z0.

They belong to the training objective, never to the generator. B batch, N tokens, C channels, H W height width.
"""

from torch import Tensor, nn


class PictureHead(nn.Module):
    """Pictures (B, C, H, W) -> (B, num_values): a small image tower, trained with the model. H and W at least 8."""

    def __init__(self, in_channels: int, num_values: int, width: int = 64) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.project = nn.Sequential(nn.LayerNorm(32 * width), nn.Linear(32 * width, num_values))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (B, C, H, W) -> (B, num_values)."""
        return self.project(self.tower(pictures))


class EmbeddingHead(nn.Module):
    """Image embeddings (B, F) -> (B, num_values): Linear to 4 F, exact GELU, LayerNorm, Linear (released, 256 px)."""

    def __init__(self, width: int, num_values: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width)
        self.fc2 = nn.Linear(4 * width, num_values)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F) -> (B, num_values)."""
        return self.fc2(self.norm(nn.functional.gelu(self.fc1(x))))


def token_head(width: int, channels: int, hidden: int = 512) -> nn.Sequential:
    """Per token (B, N, D) -> (B, N, C): three linear maps, SiLU after the first two (FlowTok's alignment)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
    )
