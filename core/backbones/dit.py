"""DiT (Peebles & Xie 2023) as CrossFlow uses it: adaLN-Zero blocks over the patches of a grid or over latent tokens.

The conditioning vector is the timestep embedding plus that of the indicator 1_c (0 conditional, 1 unconditional). A
flow map adds that of the jump to it, or gives its last third of the blocks the time s at which the jump ends.
Optional for the noise-source baselines: cross-attention to condition tokens after each self-attention, and a condition
grid concatenated to z_t. B batch, N tokens, D width, C channels, H W height width, p patch.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossflow.core.backbones.conditioning import JumpEmbedding, context_tokens, with_grid
from crossflow.core.batch import Condition, Jump
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.layers import (
    Attention,
    DepthwiseConv,
    FeedForward,
    Rotary,
    TimestepEmbedding,
    patchify,
    rotary_2d,
    sincos_2d,
    sincos_tokens,
    unpatchify,
)


class Size(NamedTuple):
    """Blocks, width D and attention heads."""

    depth: int
    width: int
    heads: int


SIZES = {
    "tiny": Size(4, 128, 4),
    "mini": Size(6, 192, 3),
    "small": Size(8, 256, 8),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "H": Size(36, 1280, 20),
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """adaLN-Zero block; after its self-attention a cross-attention (context_dim) and a depthwise convolution (conv)."""

    def __init__(self, width: int, heads: int, *, context_dim: int | None, conv: int = 0, dropout: float = 0.0) -> None:
        """width D, divisible by heads; context_dim: width of the context tokens; conv: kernel size, odd, 0 for none."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.cross = Attention(width, heads, context_dim) if context_dim is not None else None
        self.cross_norm = nn.LayerNorm(width, eps=1e-6) if context_dim is not None else None
        self.conv = DepthwiseConv(width, conv) if conv else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        context: Tensor | None,
        context_mask: Tensor | None,
        grid: tuple[int, int] | None,
        rotary: Rotary | None,
    ) -> Tensor:
        """x (B, N, D), c (B, D), context (B, M, D'), context_mask (B, M) bool, grid: (H, W) of the N tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)  # (B, D) each
        x = x + gate1[:, None] * self.dropout(self.attn(modulate(self.norm1(x), shift1, scale1), rotary=rotary))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), context, context_mask)
        if self.conv is not None and grid is not None:
            x = x + self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return x + gate2[:, None] * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))


class DiT(nn.Module):
    """Velocity network on latents (C, H, W), H and W multiples of `patch`, or (N, C).

    Grids of other sizes than the latent's are accepted if the patch divides them, except with stored positions.

    >>> network = DiT((4, 32, 32), SIZES["tiny"], BackboneConfig(patch=2))
    >>> (velocity,) = network(torch.randn(3, 4, 32, 48), torch.rand(3), torch.tensor([False, True, False]))
    >>> velocity.shape
    torch.Size([3, 4, 32, 48])
    """

    position_table: Tensor | None
    body: ClassVar[tuple[str, ...]] = ("time", "blocks", "final_modulation")
    """What the tasks of a joint run share; patches, positions, indicator, first and last layer are each task's own."""

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        size: Size,
        config: BackboneConfig,
        *,
        context_dim: int | None = None,
        grid_channels: int = 0,
    ) -> None:
        """size: of the blocks; config: patch, positions, conv, time_scale and dropout of `BackboneConfig`; context_dim,
        grid_channels: as for `build_backbone`.
        """
        super().__init__()
        self.is_grid = len(latent_shape) == 3
        self.patch = config.patch if self.is_grid else 1
        self.positions = config.positions
        self.heads = size.heads
        if config.positions == "rotary" and (not self.is_grid or size.width % (4 * size.heads)):
            raise UserError(
                "backbone.positions = rotary needs a grid latent (C, H, W) and heads whose width is a multiple of 4; "
                f"got a latent {latent_shape}, and {size.width} / {size.heads} values per head."
            )
        self.trained_grid: tuple[int, int] | None = None
        if self.is_grid:
            self.trained_grid = (latent_shape[1] // self.patch, latent_shape[2] // self.patch)
        self.num_tokens = math.prod(self.trained_grid or latent_shape[:1])
        """Positions of a latent of the trained size."""
        stored = config.positions == "stored"
        table = _sincos(self.trained_grid or latent_shape[0], size.width) if stored else None
        self.register_buffer("position_table", table)
        self.grid_channels = grid_channels
        channels = latent_shape[0] if self.is_grid else latent_shape[1]
        area = self.patch**2
        self.embed = nn.Linear((channels + grid_channels) * area, size.width)
        self.time = TimestepEmbedding(size.width, config.time_scale)
        self.indicator = nn.Embedding(2, size.width)
        self.interval = config.interval
        self.jump = JumpEmbedding(size.width, config) if config.interval != "none" else None
        self.takes_scale = config.guided
        self.null_context = nn.Parameter(torch.zeros(1, 1, context_dim)) if context_dim is not None else None
        conv = config.conv if self.is_grid else 0
        self.blocks = nn.ModuleList(
            DiTBlock(size.width, size.heads, context_dim=context_dim, conv=conv, dropout=config.dropout)
            for _ in range(size.depth)
        )
        self.final_norm = nn.LayerNorm(size.width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size.width, 2 * size.width))
        self.final = nn.Linear(size.width, channels * area)
        self._checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.indicator.weight, std=0.02)
        zero = [self.final_modulation[1], self.final]
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero += [block.modulation[1], *([block.cross.out] if block.cross is not None else [])]
            zero += [block.conv] if block.conv is not None else []
        for module in zero:  # every block starts as the identity, the velocity as zero
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        if self.jump is not None:
            self.jump.start_at_zero()

    @property
    def jumps(self) -> bool:
        """Whether this is a flow map."""
        return self.jump is not None

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of each block in the backward pass."""
        self._checkpointing = on

    def _positions(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """(N, D): the stored table, or sin-cos positions computed for the grid or the tokens; x (B, N, D)."""
        if self.position_table is None:
            return _sincos(grid or x.shape[1], x.shape[-1], x.device)
        if x.shape[1] != len(self.position_table):
            raise UserError(
                f"Expected {len(self.position_table)} tokens, for which this backbone has stored positions, got "
                f"{x.shape[1]}. Use latents of the training size."
            )
        return self.position_table

    def _conditioning(self, t: Tensor, unconditional: Tensor, jump: Jump | None) -> tuple[Tensor, Tensor]:
        """The conditioning vectors (B, D) of the blocks, and of the last third of them and the output."""
        c = self.time(t) + self.indicator(unconditional.long())
        if self.jump is None:
            return c, c
        added = self.jump(t, jump)
        if self.interval == "added" or jump is None:
            return c + added, c + added
        return c + added, self.time(jump.end) + self.indicator(unconditional.long()) + added

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        unconditional: Tensor,
        condition: Condition | None = None,
        jump: Jump | None = None,
    ) -> list[Tensor]:
        """z_t (B, *latent), t (B,) in [0, 1], unconditional (B,) bool -> [velocity (B, *latent)].

        jump: of flow maps.
        """
        x, grid = z_t, None
        if self.is_grid:
            height, width = z_t.shape[-2:]
            if height % self.patch or width % self.patch:
                raise UserError(
                    f"A latent of {height} x {width} cannot be cut into patches of {self.patch} x {self.patch}."
                )
            x = with_grid(x, condition, unconditional, self.grid_channels)
            x, grid = patchify(x, self.patch), (height // self.patch, width // self.patch)
        # In the weights' precision: under autocast the residual stream stays float32, layers compute in a half type.
        x = self.embed(x).to(self.embed.weight.dtype)  # (B, N, D)
        rotary = None
        if self.positions == "rotary" and grid is not None:
            rotary = rotary_2d(*grid, x.shape[-1] // self.heads, self.trained_grid, x.device)
        elif self.positions != "none":
            x = x + self._positions(x, grid).to(x.dtype)
        c, last_c = self._conditioning(t, unconditional, jump)  # (B, D)
        first_last = len(self.blocks) - (len(self.blocks) + 2) // 3
        context, attended = context_tokens(self.null_context, condition, unconditional)
        for number, block in enumerate(self.blocks):
            conditions = (last_c if number >= first_last else c, context, attended, grid, rotary)
            if self._checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *conditions, use_reentrant=False)
            else:
                x = block(x, *conditions)
        shift, scale = self.final_modulation(last_c).chunk(2, dim=1)
        velocity = self.final(modulate(self.final_norm(x), shift, scale))
        return [unpatchify(velocity, self.patch, *z_t.shape[-2:]) if self.is_grid else velocity]


def _sincos(where: tuple[int, ...] | int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid (height, width) or of a number of tokens: (N, width) float32."""
    if isinstance(where, int):
        return sincos_tokens(where, width, device)
    height, columns = where
    return sincos_2d(height, columns, width, device)


def build_dit(
    config: BackboneConfig, latent_shape: tuple[int, ...], *, context_dim: int | None = None, grid_channels: int = 0
) -> DiT:
    """A DiT of a named size; `width`, `depth`, `heads` of the configuration override the row of the table."""
    if config.size not in SIZES:
        raise unknown_name("DiT size", config.size, SIZES)
    row = SIZES[config.size]
    size = Size(config.depth or row.depth, config.width or row.width, config.heads or row.heads)
    if size.width % size.heads or size.width % 4:
        raise UserError(f"backbone.width = {size.width} must be a multiple of 4 and of backbone.heads = {size.heads}.")
    return DiT(latent_shape, size, config, context_dim=context_dim, grid_channels=grid_channels)
