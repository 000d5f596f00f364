"""Blocks shared by backbones and trunks. B batch, N tokens, D width, C channels, H W height width."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.autograd.function import FunctionCtx, once_differentiable

_FEW_KEYS = 512
"""Up to this number, whose products fit the caches, attention on the CPU is trained without torch's kernel."""
_LARGE_KERNEL = 7
"""Side from which depthwise convolutions on the CPU are differentiated by `_LargeDepthwise`; for 3 torch is faster."""


class Attention(nn.Module):
    """Multi-head attention: self-attention, or cross-attention to tokens of width `context_dim`.

    width D, divisible by heads; qkv_bias: of the self-attention's first linear map.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        self.heads = heads
        if context_dim is None:
            self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        else:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(context_dim, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, rotary: "Rotary | None" = None
    ) -> Tensor:
        """x (B, N, D), context (B, M, D'), mask (B, M) bool of the keys, True = attended -> (B, N, D).

        rotary: positions of the N tokens; self-attention only, without `mask`.
        """
        allowed = None if mask is None else mask[:, None, None, :]
        if rotary is not None:
            assert context is None, "rotary positions are for self-attention only"
            assert mask is None, "rotary positions are for grids, which have no padding"
            turned, v = self._heads(self.qkv(x), 3).split([2 * self.heads, self.heads], dim=1)
            (q, k), allowed = rotary.turn(turned).chunk(2, dim=1), rotary.near
        elif context is None:
            q, k, v = self._heads(self.qkv(x), 3).chunk(3, dim=1)
        else:
            q, (k, v) = self._heads(self.q(x), 1), self._heads(self.kv(context), 2).chunk(2, dim=1)
        attended = _attend(q, k, v, allowed)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, num_parts: int) -> Tensor:
        """(B, N, parts D) -> (B, parts heads, N, D / heads)."""
        return x.unflatten(-1, (num_parts * self.heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d); allowed (B or 1, 1, N or 1, M) bool, each row with a True."""
    few = k.shape[2] <= _FEW_KEYS
    if q.device.type != "cpu" or q.dtype == torch.float32 or not (few and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    # The backward pass of the CPU's kernel for half types takes several times as long as these products.
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


@dataclass(frozen=True)
class Rotary:
    """Positions of a grid of N = H W tokens that extend to grids larger than those of training.

    Queries and keys are rotated by angles proportional to their row and column, so attention depends only on relative
    positions (RoPE, Su et al. 2021; two axes as in Heo et al. 2024). Relative positions that never occurred in
    training were not learned, so such pairs do not attend: a wide picture is read as its parts would be.

    cos, sin: (N, d / 2) for heads of width d; near: (N, N) bool, or None where all pairs attend.
    """

    cos: Tensor
    sin: Tensor
    near: Tensor | None

    def turn(self, x: Tensor) -> Tensor:
        """x (B, heads, N, d) -> the same with each pair (x[i], x[i + d/2]) rotated by its token's angle i."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_2d(
    height: int, width: int, dim: int, reach: tuple[int, int] | None = None, device: torch.device | None = None
) -> Rotary:
    """The `Rotary` of a grid (row-major) for heads of width `dim`, a multiple of 4.

    Half of the angles belong to rows, half to columns, with geometrically spaced wavelengths. reach: height and
    width of the largest grid of training; pairs at a larger distance do not attend. None: all pairs do.
    """
    assert dim % 4 == 0, f"rotary positions need heads whose width is a multiple of 4, not {dim}"
    cos, sin = _table(_rotary_angles, (height, width, dim), device).unbind(0)
    within = reach is None or (height <= reach[0] and width <= reach[1])
    near = None if reach is None or within else _table(_within_reach, (height, width, *reach), device)
    return Rotary(cos, sin, near)


def _rotary_angles(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """(2, H W, dim / 2) float32: cosines and sines, the first half of the angles by row, the second by column."""
    rows, columns = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
    quarter = dim // 4
    # Wavelengths from 2 pi to about 600 tokens: grids have tens of rows, not the thousands of tokens of a text.
    omega = 100 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.cat([rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def _within_reach(height: int, width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(H W, H W) bool: whether two tokens are fewer than `rows` rows and `columns` columns apart."""
    row, column = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
    row, column = row.flatten(), column.flatten()
    near = ((row[:, None] - row).abs() < rows) & ((column[:, None] - column).abs() < columns)
    return near.to(device)


class FeedForward(nn.Module):
    """Linear, GELU, Linear. `approximate` is that of torch's GELU ("tanh" in the released DiT), see `gelu`."""

    def __init__(self, width: int, hidden: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.approximate = approximate
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(gelu(self.up(x), self.approximate))


def gelu(x: Tensor, approximate: str) -> Tensor:
    """torch's GELU, but in a half type on the CPU always the exact one, whose kernel takes a tenth of the time.

    The two differ by at most 5e-4, while rounding x to bfloat16 alone changes the result by up to 4e-3.
    """
    exact = x.device.type == "cpu" and x.dtype != torch.float32
    return F.gelu(x, approximate="none" if exact else approximate)


def autocasted(x: Tensor) -> Tensor:
    """x in the type in which autocast computes matrix products, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class SampleLinear(nn.Linear):
    """A linear map of one vector per sample, not per token: (B, D') -> (B, D).

    On the CPU it is computed in float32 also under autocast: the rows are so few that the conversion of the weight and
    of its gradient takes longer than the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D') -> (B, D)."""
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel by itself with an odd `kernel`, padded to keep the size: (B, C, H, W) -> the same.

    On the CPU it is computed in float32 also under autocast: the backward pass of a half type takes twice as long.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), fastest in channels-last order -> (B, C, H, W)."""
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.weight.dtype)
            if self.kernel_size[0] < _LARGE_KERNEL or not torch.is_grad_enabled():
                return super().forward(x)
            return _LargeDepthwise.apply(x, self.weight, self.bias)


class _LargeDepthwise(torch.autograd.Function):
    """The depthwise convolution of x (B, C, H, W) with weight (C, 1, k, k) and bias (C,), k odd, for the CPU.

    The gradient of the weight is the correlation of each channel of x with that of the output's gradient: a depthwise
    convolution too, in a quarter of the time that torch's kernel takes.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        (b, c, h, w), padding = x.shape, weight.shape[-1] // 2
        channels, over = x.reshape(1, b * c, h, w), gradient.reshape(b * c, 1, h, w)
        weights = F.conv2d(channels, over, padding=padding, groups=b * c).unflatten(1, (b, c)).sum((0, 1))  # (C, k, k)
        inputs = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            inputs = F.conv2d(gradient, weight.flip(2, 3), padding=padding, groups=c)
        return inputs, weights[:, None], gradient.sum((0, 2, 3))


class TransformerLayer(nn.Module):
    """Pre-norm layer of the small trunks: self-attention, optional cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if context_dim is not None else None
        self.cross = Attention(width, heads, context_dim) if context_dim is not None else None
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, int(width * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """x (B, N, D), mask (B, N) bool, context (B, M, D'), context_mask (B, M) bool -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), mask=mask, rotary=rotary)
        if self.cross is not None and self.cross_norm is not None:
            assert context is not None
            x = x + self.cross(self.cross_norm(x), context, context_mask)
        return x + self.mlp(self.norm2(x))


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """[sin | cos] of position x 10000^(-2i/width): positions (N,) -> (N, width) float64 on the CPU, width even.

    Not every device has float64: `sincos_tokens` and `sincos_2d` copy the finished table to the device.
    """
    omega = 10000 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angle = positions.cpu().double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_tokens(num_tokens: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a sequence: (num_tokens, width) float32, width even."""
    return _table(_sincos_tokens, (num_tokens, width), device)


def sincos_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid, row-major: (H * W, dim) float32.

    The first half of dim codes the column, the second the row; dim must be a multiple of 4 (the layout of MAE and DiT).
    """
    return _table(_sincos_2d, (height, width, dim), device)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Positions (N, D) of a row-major grid, bilinearly interpolated for another `grid` (H, W) of the same proportions:
    (H W, D). None if N positions make no such grid.
    """
    height = math.isqrt(len(table) * grid[0] // grid[1])
    width = height * grid[1] // grid[0]
    if height * width != len(table) or height == 0:
        return None
    planes = table.float().T.unflatten(1, (height, width))[None]
    return F.interpolate(planes, grid, mode="bilinear", align_corners=False)[0].flatten(1).T.to(table.dtype)


def _sincos_tokens(num_tokens: int, width: int, device: torch.device) -> Tensor:
    return sincos_1d(torch.arange(num_tokens, device="cpu"), width).float().to(device)


def _sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
    table = torch.cat([sincos_1d(columns.flatten(), dim // 2), sincos_1d(rows.flatten(), dim // 2)], dim=1)
    return table.float().to(device)


def _table(make: Callable[..., Tensor], sizes: tuple[int, ...], device: torch.device | None) -> Tensor:
    """make(*sizes, device), by default on the default device; a copy that the caller may modify."""
    device = device or torch.get_default_device()
    # The compiler warns about caches, so it traces the function itself; a fake tensor must not outlive its mode.
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return make(*sizes, device)
    return _cached(make, sizes, device).clone()


# Every evaluation of a network needs its table, which is computed on the CPU.
@functools.lru_cache(maxsize=64)
def _cached(make: Callable[..., Tensor], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return make(*sizes, device)


class TimestepEmbedding(nn.Module):
    """[cos | sin] of scale * t * 10000^(-i/half), Linear, SiLU, Linear: t (B,) -> (B, D).

    `scale` is 1 in the released DiT.
    """

    def __init__(self, width: int, scale: float = 1000.0, num_frequencies: int = 128) -> None:
        super().__init__()
        self.scale = scale
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, D)."""
        i = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32)
        angle = self.scale * t.float()[:, None] * torch.exp(-math.log(10000) * i / self.num_frequencies)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, p * p * C), row-major patches, inside a patch (row, column, C) with C fastest."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`: (B, H/p * W/p, p * p * C) -> (B, C, H, W)."""
    b = tokens.shape[0]  # len() would fix the batch size of an exported graph
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)
