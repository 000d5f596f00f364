"""DiMR (Liu et al. 2024, arXiv 2406.09416) as CrossFlow uses it: stages of rising resolution, each with its velocity.

Every stage reads the whole z_t. The first, coarsest one is a U-shaped Transformer that carries the indicator 1_c as an
extra token; the others are U-shaped stacks of ConvNeXt blocks and add the upsampled features of the stage before.
Time enters through the norms: p(t) = p1 + (p0 - p1) sigmoid((w + 1) c + b), c = log_snr / 4 = 1 - 2t. A flow map adds
the embedding of the jump to the input of each stage, or gives the last stage the time s at which the jump ends.
B batch, N tokens, D width, C channels, H W height width of a stage.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossflow.core.backbones.conditioning import JumpEmbedding, context_tokens, with_grid
from crossflow.core.batch import Condition, Jump
from crossflow.core.config import BackboneConfig, StageConfig
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.layers import Attention, DepthwiseConv, autocasted, unpatchify


class Size(NamedTuple):
    """Blocks, width and heads of the first stage; each later stage has half the width of the one before and half the
    blocks of the first.
    """

    depth: int
    width: int
    heads: int


SIZES = {
    "tiny": Size(3, 64, 2),
    "mini": Size(5, 128, 4),
    # The sizes of Fig. 3, of which the ablations use the smallest; the papers give only the widths of the largest.
    "S": Size(19, 512, 8),  # 70M
    "M": Size(25, 640, 10),  # 144M
    "B": Size(33, 768, 12),  # 273M
    "L": Size(49, 896, 14),  # 550M
    "XL": Size(65, 1024, 16),  # 0.95B, as released
}


class TimeParameter(nn.Module):
    """A vector (D,) that moves with time: c (B,) -> p1 + (p0 - p1) sigmoid((w + 1) c + b), (B, D)."""

    def __init__(self, width: int, centre: float) -> None:
        super().__init__()
        # Different values: w and b have no gradient while p0 and p1 are equal.
        self.param0 = nn.Parameter(centre + 0.02 * torch.randn(width))
        self.param1 = nn.Parameter(centre + 0.02 * torch.randn(width))
        self.nodecay_weight = nn.Parameter(torch.zeros(width))
        self.nodecay_bias = nn.Parameter(torch.zeros(width))

    def forward(self, c: Tensor) -> Tensor:
        """c (B,) in [-1, 1] -> (B, D)."""
        share = torch.sigmoid((self.nodecay_weight + 1) * c[:, None] + self.nodecay_bias)
        return self.param1 + (self.param0 - self.param1) * share


def _along(p: Tensor, x: Tensor) -> Tensor:
    """p (B, D) -> (B, 1, ..., 1, D), with as many axes as x."""
    return p.reshape(p.shape[0], *[1] * (x.ndim - 2), p.shape[-1])


class TimeRMSNorm(nn.Module):
    """x (B, ..., D), c (B,) -> x / (rms(x) + 1e-8) * scale(c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = TimeParameter(width, 1.0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, ..., D), c (B,) -> like x."""
        exact = x.float()  # the square of a half type overflows
        # In terms of the norm, sqrt(D) rms, it takes half as many passes over x, forwards and backwards.
        root = x.shape[-1] ** 0.5
        inverse = root / (torch.linalg.vector_norm(exact, dim=-1, keepdim=True) + 1e-8 * root)
        return (exact * inverse * _along(self.scale(c), x)).to(x.dtype)


class TimeLayerNorm(nn.Module):
    """x (B, ..., D), c (B,) -> LayerNorm(x) * weight(c) + bias(c), eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = TimeParameter(width, 1.0)
        self.bias = TimeParameter(width, 0.0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, ..., D), c (B,) -> like x."""
        normed = F.layer_norm(x.float(), (self.width,))
        return (normed * _along(self.weight(c), x)).add_(_along(self.bias(c), x)).to(x.dtype)


class GatedFeedForward(nn.Module):
    """out(GELU(gate x) * value x), with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = autocasted(x)  # here, so that both maps share the conversion
        return self.out(F.gelu(self.gate(x)) * self.value(x))


class TransformerBlock(nn.Module):
    """x (B, N, D): x += attn(norm(x)); x += mlp(norm(x)). With context_dim a cross-attention lies between the two."""

    def __init__(self, stage: StageConfig, context_dim: int | None, dropout: float) -> None:
        super().__init__()
        width = stage.width
        self.norm1 = TimeRMSNorm(width)
        self.attn = Attention(width, stage.heads, qkv_bias=False)
        self.cross_norm = TimeRMSNorm(width) if context_dim is not None else None
        self.cross = Attention(width, stage.heads, context_dim) if context_dim is not None else None
        self.norm2 = TimeRMSNorm(width)
        self.mlp = GatedFeedForward(width, stage.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """x (B, N, D), c (B,), context (B, M, D'), context_mask (B, M) bool -> (B, N, D)."""
        x = x + self.dropout(self.attn(self.norm1(x, c)))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x, c), context, context_mask))
        return x + self.dropout(self.mlp(self.norm2(x, c)))


class ConvNeXtBlock(nn.Module):
    """x (B, H, W, D): x += depthwise 7 x 7 (x), without a norm before it; x += mlp(norm(x))."""

    def __init__(self, stage: StageConfig, dropout: float) -> None:
        super().__init__()
        self.conv = DepthwiseConv(stage.width, 7)
        self.norm = TimeRMSNorm(stage.width)
        self.mlp = GatedFeedForward(stage.width, stage.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, H, W, D), c (B,) -> (B, H, W, D)."""
        x = x + self.dropout(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.dropout(self.mlp(self.norm(x, c)))


class Upsample(nn.Module):
    """Features (B, h, w, F) of the stage before -> (B, r h, r w, D): norm, Linear, pixel shuffle, norm."""

    def __init__(self, features: int, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.norm_in = TimeLayerNorm(features)
        self.linear = nn.Linear(features, width * ratio**2)
        self.norm_out = TimeLayerNorm(width)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        """features (B, h, w, F), c (B,) -> (B, r h, r w, D)."""
        height, width = features.shape[1:3]
        x = self.linear(self.norm_in(features, c)).flatten(1, 2)
        return self.norm_out(unpatchify(x, self.ratio, height * self.ratio, width * self.ratio).permute(0, 2, 3, 1), c)


class Stage(nn.Module):
    """A resolution: its input, U-shaped blocks, and its velocity. It has learned positions for `grid` (H, W).

    The outputs of the first n of 2n + 1 blocks are, last in first out, the skips of the last n.
    """

    def __init__(
        self, channels: tuple[int, int], stage: StageConfig, grid: tuple[int, int], before: tuple[int, int] | None
    ) -> None:
        """channels: of z_t and of the velocity; before: (features, upsampling ratio) of the stage before, if any."""
        super().__init__()
        width, self.stage, self.grid = stage.width, stage, grid
        self.embed = nn.Conv2d(channels[0], width, stage.patch, stride=stage.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))
        self.grids = {"positions": grid}
        self.upsample = Upsample(before[0], width, before[1]) if before is not None else None
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(stage.depth // 2))
        self.norm = TimeLayerNorm(width)
        self.out = nn.Conv2d(width, channels[1], 3, padding=1)
        self.checkpointing = False

    @property
    def num_blocks(self) -> int:
        """The depth, made odd: as many blocks before the middle one as after it."""
        return 2 * (self.stage.depth // 2) + 1

    @property
    def num_features(self) -> int:
        """Channels of the features that the next stage reads: those of the input and of every block."""
        return (self.num_blocks + 1) * self.stage.width

    def enter(self, z_t: Tensor, features: Tensor | None, c: Tensor, jump: Tensor | float) -> Tensor:
        """z_t (B, C, H', W') at full resolution, the features of the stage before, and the embedding (B, D) of a jump
        -> (B, H, W, D).
        """
        pooled = F.avg_pool2d(z_t, self.stage.pool) if self.stage.pool > 1 else z_t
        # In the weights' precision: under autocast the residual stream stays float32, layers compute in a half type.
        x = self.embed(pooled).to(self.embed.weight.dtype).permute(0, 2, 3, 1)
        x = x + self._positions(x.shape[1], x.shape[2])
        if isinstance(jump, Tensor):
            x = x + _along(jump, x)
        return x if self.upsample is None or features is None else x + self.upsample(features, c)

    def _positions(self, height: int, width: int) -> Tensor:
        """(H, W, D): the learned table, interpolated for a grid of another size."""
        table = self.positions.unflatten(0, self.grid)
        if (height, width) == self.grid:
            return table
        grid = table.permute(2, 0, 1)[None].float()
        stretched = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
        return stretched[0].permute(1, 2, 0).to(table.dtype)

    def through(self, x: Tensor, blocks: nn.ModuleList, *conditions: Tensor | None) -> list[Tensor]:
        """The outputs of all blocks, in order."""
        outputs: list[Tensor] = []
        num_skips = len(self.skips)
        for i, block in enumerate(blocks):
            if i > num_skips:
                skip = outputs[2 * num_skips - i]
                # Converted before they are joined, which moves half of the bytes.
                x = self.skips[i - num_skips - 1](torch.cat([autocasted(x), autocasted(skip)], dim=-1))
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *conditions, use_reentrant=False)
            else:
                x = block(x, *conditions)
            outputs.append(x)
        return outputs

    def leave(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, H, W, D) -> velocity (B, C, H, W)."""
        return self.out(self.norm(x, c).permute(0, 3, 1, 2))


class TransformerStage(Stage):
    """The coarsest stage. The indicator token is first, has no position, and is dropped before the output."""

    def __init__(
        self,
        channels: tuple[int, int],
        stage: StageConfig,
        grid: tuple[int, int],
        context_dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__(channels, stage, grid, None)
        self.unconditional = nn.Parameter(torch.tensor([-1.0]))
        self.conditional = nn.Parameter(torch.tensor([1.0]))
        self.null_context = nn.Parameter(torch.zeros(1, 1, context_dim)) if context_dim is not None else None
        self.blocks = nn.ModuleList(TransformerBlock(stage, context_dim, dropout) for _ in range(self.num_blocks))

    def forward(
        self, z_t: Tensor, c: Tensor, unconditional: Tensor, condition: Condition | None, jump: Tensor | float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Velocity (B, C, H, W) and features, each (B, H, W, D)."""
        x = self.enter(z_t, None, c, jump)
        grid = x.shape[1:3]
        token = torch.where(unconditional[:, None, None], self.unconditional, self.conditional)
        tokens = torch.cat([token.expand(-1, 1, x.shape[-1]).to(x.dtype), x.flatten(1, 2)], dim=1)  # (B, 1 + H W, D)
        context, attended = context_tokens(self.null_context, condition, unconditional)
        outputs = self.through(tokens, self.blocks, c, context, attended)
        features = [x, *(output[:, 1:].unflatten(1, grid) for output in outputs)]
        return self.leave(features[-1], c), features


class ConvStage(Stage):
    """A finer stage of ConvNeXt blocks; the indicator reaches it through the features of the stage before."""

    def __init__(
        self,
        channels: tuple[int, int],
        stage: StageConfig,
        grid: tuple[int, int],
        before: tuple[int, int],
        dropout: float,
    ) -> None:
        super().__init__(channels, stage, grid, before)
        self.blocks = nn.ModuleList(ConvNeXtBlock(stage, dropout) for _ in range(self.num_blocks))

    def forward(
        self, z_t: Tensor, c: Tensor, features: Sequence[Tensor], jump: Tensor | float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Velocity (B, C, H, W) and features, each (B, H, W, D)."""
        x = self.enter(z_t, torch.cat(list(features), dim=-1), c, jump)
        outputs = self.through(x, self.blocks, c)
        return self.leave(outputs[-1], c), [x, *outputs]


class DiMR(nn.Module):
    """Velocity network on latents (C, H, W): a stage of Transformer blocks, then finer ones of ConvNeXt blocks.

    A stage has K = patch x pool, the last one K = 1. Grids of other sizes that the largest K divides are accepted, with
    positions stretched to them.

    >>> config = BackboneConfig(name="dimr", size="tiny", num_stages=2)
    >>> network = DiMR((4, 16, 16), default_stages(config), config)
    >>> velocities = network(torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([False, True, False]))
    >>> [tuple(velocity.shape) for velocity in velocities]
    [(3, 4, 8, 8), (3, 4, 16, 16)]
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        stages: Sequence[StageConfig],
        config: BackboneConfig,
        *,
        context_dim: int | None = None,
        grid_channels: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.grid_channels = grid_channels
        self.shrinks = stages[0].patch * stages[0].pool
        first, *finer = stages
        grids = [(height // (stage.patch * stage.pool), width // (stage.patch * stage.pool)) for stage in stages]
        both = (channels + grid_channels, channels)
        built: list[Stage] = [TransformerStage(both, first, grids[0], context_dim, config.dropout)]
        for stage, grid, coarser in zip(finer, grids[1:], grids[:-1], strict=True):
            built.append(ConvStage(both, stage, grid, (built[-1].num_features, grid[0] // coarser[0]), config.dropout))
        self.stages = nn.ModuleList(built)
        self.interval, self.takes_scale = config.interval, config.guided
        self.jump = nn.ModuleList(JumpEmbedding(stage.width, config) for stage in stages if self.jumps)
        self.num_tokens = sum(rows * columns for rows, columns in grids)
        """Positions of a latent of the trained size, of all stages."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for jump in self.jump:
            jump.start_at_zero()  # type: ignore[operator]

    @property
    def jumps(self) -> bool:
        """Whether this is a flow map."""
        return self.interval != "none"

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of each block in the backward pass."""
        for stage in self.stages:
            stage.checkpointing = on  # type: ignore[assignment]

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        unconditional: Tensor,
        condition: Condition | None = None,
        jump: Jump | None = None,
    ) -> list[Tensor]:
        """z_t (B, C, H, W), t (B,) in [0, 1], unconditional (B,) bool -> velocities (B, C, H / K, W / K) by stage.

        jump: of flow maps.

        Raises UserError for a size that the largest K does not divide.
        """
        if z_t.shape[-2] % self.shrinks or z_t.shape[-1] % self.shrinks:
            raise _indivisible(z_t.shape[-2], z_t.shape[-1], self.shrinks)
        c = last_c = 1 - 2 * t.float()
        if self.interval == "split" and jump is not None:
            last_c = 1 - 2 * jump.end.float()
        added = [embedding(t, jump) for embedding in self.jump] or [0.0] * len(self.stages)
        z_t = with_grid(z_t, condition, unconditional, self.grid_channels)
        velocity, features = self.stages[0](z_t, c, unconditional, condition, added[0])
        velocities = [velocity]
        for number, stage in enumerate(self.stages[1:], start=1):
            velocity, features = stage(z_t, last_c if number == len(self.stages) - 1 else c, features, added[number])
            velocities.append(velocity)
        return velocities


def _indivisible(height: int, width: int, shrinks: int) -> UserError:
    return UserError(
        f"The first stage of this DiMR shrinks its input {shrinks} times, which does not divide a latent of "
        f"{height} x {width}. Choose another size, or fewer stages."
    )


def default_stages(config: BackboneConfig) -> tuple[StageConfig, ...]:
    """The stages of a named size; `width`, `depth` and `heads` of the configuration override the row of the table."""
    if config.size not in SIZES:
        raise unknown_name("DiMR size", config.size, SIZES)
    row = SIZES[config.size]
    depth, width, heads = config.depth or row.depth, config.width or row.width, config.heads or row.heads
    patches = [2 ** (config.num_stages - 1 - i) for i in range(config.num_stages)]
    if width % (patches[0] * heads):
        raise UserError(
            f"backbone.width = {width} must be a multiple of backbone.heads = {heads} times {patches[0]}: each of the "
            f"{config.num_stages} stages has half the width of the one before."
        )
    shapes = [(width // 2**i, depth if i == 0 else max(1, depth // 2)) for i in range(config.num_stages)]
    return tuple(
        StageConfig(width=width, hidden=2 * width, depth=depth, heads=heads, patch=patch)
        for (width, depth), patch in zip(shapes, patches, strict=True)
    )


def build_dimr(
    config: BackboneConfig, latent_shape: tuple[int, ...], *, context_dim: int | None = None, grid_channels: int = 0
) -> DiMR:
    """The DiMR of `backbone.stages`, or of a named size with `backbone.num_stages` resolutions."""
    if len(latent_shape) != 3:
        raise UserError(
            f"DiMR works on grids (C, H, W), not on latents {tuple(latent_shape)}; use backbone.name = dit."
        )
    stages = config.stages or default_stages(config)
    shrinks = [stage.patch * stage.pool for stage in stages]
    if shrinks[-1] != 1 or any(coarse % fine for coarse, fine in pairwise(shrinks)):
        raise UserError(
            f"The stages of a DiMR shrink the latent by {', '.join(map(str, shrinks))}; each must be a multiple of the "
            "next, and the last must be 1."
        )
    if stages[0].width % stages[0].heads:
        raise UserError(f"The first stage's width {stages[0].width} is not a multiple of its {stages[0].heads} heads.")
    if latent_shape[1] % shrinks[0] or latent_shape[2] % shrinks[0]:
        raise _indivisible(latent_shape[1], latent_shape[2], shrinks[0])
    if config.interval == "split" and len(stages) == 1:
        raise UserError(
            "backbone.interval = split gives the last stage of a DiMR the time at which a jump ends, and this one has "
            "a single stage. Use backbone.interval = added, or more stages."
        )
    return DiMR(latent_shape, stages, config, context_dim=context_dim, grid_channels=grid_channels)
