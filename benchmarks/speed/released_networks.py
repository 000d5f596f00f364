"""The networks of a product's model computed as the released code does: with the same weights, written out plainly.

Attention is computed in float32 as softmax(q k^T / sqrt(d)) v with all scores in memory, norms and time parameters
operator by operator, and every block recomputes its activations in the backward pass.
B batch, N tokens, D width, C channels, H W height width.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossflow.core.backbones import dimr, dit
from crossflow.core.backbones.dimr import DiMR, GatedFeedForward, TimeLayerNorm, TimeParameter, TimeRMSNorm
from crossflow.core.backbones.dit import DiT
from crossflow.core.errors import UserError
from crossflow.core.layers import Attention, SampleLinear, patchify, sincos_2d, sincos_tokens, unpatchify
from crossflow.core.model import CrossFlow
from crossflow.networks.text.variational import PostNormLayer, TextVariationalTrunk, UnbiasedNorm


class ReleasedModel(nn.Module):
    """Source encoder and backbone with copies of the weights of `model`; the same functions as far as rounding goes.

    Raises UserError for a model without a counterpart among the released ones.
    """

    def __init__(self, model: CrossFlow) -> None:
        super().__init__()
        trunk, backbone = model.source_encoder.trunk, model.backbone
        networks = {DiMR: ReleasedDiMR, DiT: ReleasedDiT}
        if not isinstance(trunk, TextVariationalTrunk) or type(backbone) not in networks:
            raise UserError(
                "The released way is written down for source.trunk = released with the backbones dimr and dit. Choose "
                "a recipe of the papers, such as t2i_256_dimr_70m."
            )
        copies: dict[int, Any] = {}
        twin = copy.deepcopy(model, copies)
        self.weights = {name: copies[id(weight)] for name, weight in model.named_parameters()}
        """The copied parameters by their names in the product's model."""
        self.trunk = ReleasedTrunk(twin.source_encoder.trunk)  # type: ignore[arg-type]
        self.backbone = networks[type(backbone)](twin.backbone)

    def moments(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, N, D), mask (B, N) bool -> mean and log-variance (B, *latent) in float32."""
        mean, log_var = self.trunk(features, mask).float().unbind(1)
        return mean, log_var

    def velocities(self, z_t: Tensor, t: Tensor, unconditional: Tensor) -> list[Tensor]:
        """z_t (B, *latent), t (B,), unconditional (B,) bool -> velocities, coarse to fine."""
        return self.backbone(z_t, t, unconditional)


def recomputed(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """The block's output; its activations are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


class PlainAttention(nn.Module):
    """Attention with all scores written out in float32."""

    def __init__(self, product: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = product.heads, product.qkv, product.out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), mask (B, N) bool of the keys -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).float()
        with torch.autocast(x.device.type, enabled=False):
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, N)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
            attended = scores.softmax(dim=-1) @ v
        return self.out(attended.transpose(1, 2).flatten(2))


def time_vector(parameter: TimeParameter, c: Tensor, like: Tensor) -> Tensor:
    """p1 + (p0 - p1) sigmoid((w + 1) c + b) with the axes of `like`; c (B,)."""
    logits = (parameter.nodecay_weight + 1) * c[:, None] + parameter.nodecay_bias
    vector = parameter.param1 + (parameter.param0 - parameter.param1) * torch.sigmoid(logits)
    return vector.view(len(vector), *[1] * (like.ndim - 2), -1)


def rms_norm(norm: TimeRMSNorm, x: Tensor, c: Tensor) -> Tensor:
    """x / (rms(x) + 1e-8) * scale(c)."""
    rms = x.float().norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / (rms + 1e-8) * time_vector(norm.scale, c, x)


def layer_norm(norm: TimeLayerNorm, x: Tensor, c: Tensor) -> Tensor:
    """LayerNorm(x) * weight(c) + bias(c)."""
    mean = x.float().mean(-1, keepdim=True)
    variance = (x.float() - mean).square().mean(-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + 1e-5)
    return normed * time_vector(norm.weight, c, x) + time_vector(norm.bias, c, x)


def gated(mlp: GatedFeedForward, x: Tensor) -> Tensor:
    """out(GELU(gate x) * value x)."""
    return mlp.out(F.gelu(mlp.gate(x)) * mlp.value(x))


class TransformerBlock(nn.Module):
    """A block of the first stage."""

    def __init__(self, block: dimr.TransformerBlock) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = PlainAttention(block.attn)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B,) -> (B, N, D)."""
        x = x + self.attn(rms_norm(self.norm1, x, c))
        return x + gated(self.mlp, rms_norm(self.norm2, x, c))


class ConvNeXtBlock(nn.Module):
    """A block of a later stage."""

    def __init__(self, block: dimr.ConvNeXtBlock) -> None:
        super().__init__()
        self.conv, self.norm, self.mlp = block.conv, block.norm, block.mlp

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, H, W, D), c (B,) -> (B, H, W, D)."""
        pixels = x.permute(0, 3, 1, 2).contiguous()
        # torch's own convolution in the precision of autocast, not that of the product's `DepthwiseConv`.
        x = x + nn.Conv2d.forward(self.conv, pixels).permute(0, 2, 3, 1)
        return x + gated(self.mlp, rms_norm(self.norm, x, c))


class ReleasedStage(nn.Module):
    """A resolution: its input, U-shaped blocks and velocity; the first carries the indicator as an extra token."""

    def __init__(self, stage: dimr.TransformerStage | dimr.ConvStage) -> None:
        super().__init__()
        self.stage, self.num_skips = stage, len(stage.skips)
        self.indicators: tuple[Tensor, Tensor] | None = None
        kind: Any = ConvNeXtBlock
        if isinstance(stage, dimr.TransformerStage):
            kind, self.indicators = TransformerBlock, (stage.unconditional, stage.conditional)
        self.blocks = nn.ModuleList(kind(block) for block in stage.blocks)
        stage.blocks = nn.ModuleList()

    def forward(self, z_t: Tensor, c: Tensor, unconditional: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """z_t (B, C, H', W'), c (B,), features (B, h, w, F) of the stage before -> velocity and features."""
        stage = self.stage
        x = stage.embed(z_t).permute(0, 2, 3, 1).float()
        x = x + stage.positions.view(*stage.grid, -1)
        if features is not None and stage.upsample is not None:
            x = x + self._upsampled(stage.upsample, features, c)
        outputs = self._through(x, c, unconditional)
        velocity = stage.out(layer_norm(stage.norm, outputs[-1], c).permute(0, 3, 1, 2))
        return velocity, torch.cat([x, *outputs], dim=-1)

    @staticmethod
    def _upsampled(upsample: dimr.Upsample, features: Tensor, c: Tensor) -> Tensor:
        height, width = features.shape[1:3]
        ratio = upsample.ratio
        x = upsample.linear(layer_norm(upsample.norm_in, features, c))
        x = unpatchify(x.flatten(1, 2), ratio, height * ratio, width * ratio).permute(0, 2, 3, 1)
        return layer_norm(upsample.norm_out, x, c)

    def _through(self, x: Tensor, c: Tensor, unconditional: Tensor) -> list[Tensor]:
        """The outputs (B, H, W, D) of all blocks."""
        grid = x.shape[1:3]
        if self.indicators is not None:
            token = torch.where(unconditional[:, None, None], *self.indicators)
            x = torch.cat([token.expand(-1, 1, x.shape[-1]), x.flatten(1, 2)], dim=1)
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number > self.num_skips:
                x = self.stage.skips[number - self.num_skips - 1](torch.cat([x, kept.pop()], dim=-1))
            x = recomputed(block, x, c)
            if number < self.num_skips:
                kept.append(x)
            outputs.append(x)
        return outputs if self.indicators is None else [output[:, 1:].unflatten(1, grid) for output in outputs]


class ReleasedDiMR(nn.Module):
    """Stages of rising resolution; every stage reads the whole z_t."""

    def __init__(self, product: DiMR) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ReleasedStage(stage) for stage in product.stages)  # type: ignore[arg-type]

    def forward(self, z_t: Tensor, t: Tensor, unconditional: Tensor) -> list[Tensor]:
        """z_t (B, C, H, W), t (B,), unconditional (B,) bool -> velocities, coarse to fine."""
        c = (4 - 8 * t.float()) / 4
        features: Tensor | None = None
        velocities = []
        for stage in self.stages:
            velocity, features = stage(z_t, c, unconditional, features)
            velocities.append(velocity)
        return velocities


class DiTBlock(nn.Module):
    """An adaLN-Zero block."""

    def __init__(self, block: dit.DiTBlock) -> None:
        super().__init__()
        self.attn = PlainAttention(block.attn)
        self.norm1, self.norm2, self.modulation = block.norm1, block.norm2, block.modulation
        self.up, self.down = block.mlp.up, block.mlp.down

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in self.modulation(c).chunk(6, dim=1))
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.down(hidden)


class ReleasedDiT(nn.Module):
    """DiT over the patches of a grid or over latent tokens."""

    def __init__(self, product: DiT) -> None:
        super().__init__()
        self.product = product
        self.blocks = nn.ModuleList(DiTBlock(block) for block in product.blocks)  # type: ignore[arg-type]
        product.blocks = nn.ModuleList()

    def forward(self, z_t: Tensor, t: Tensor, unconditional: Tensor) -> list[Tensor]:
        """z_t (B, *latent), t (B,), unconditional (B,) bool -> [velocity (B, *latent)]."""
        net = self.product
        x = net.embed(patchify(z_t, net.patch) if net.is_grid else z_t).float()
        x = x + self._positions(x, z_t)
        c = net.time(t) + net.indicator(unconditional.long())
        for block in self.blocks:
            x = recomputed(block, x, c)
        shift, scale = net.final_modulation(c).chunk(2, dim=1)
        velocity = net.final(net.final_norm(x) * (1 + scale[:, None]) + shift[:, None])
        return [unpatchify(velocity, net.patch, *z_t.shape[-2:]) if net.is_grid else velocity]

    def _positions(self, x: Tensor, z_t: Tensor) -> Tensor:
        """(N, D): the stored table, or that of the grid or the tokens."""
        net, width = self.product, x.shape[-1]
        if net.position_table is not None:
            return net.position_table
        if not net.is_grid:
            return sincos_tokens(x.shape[1], width, x.device)
        return sincos_2d(z_t.shape[-2] // net.patch, z_t.shape[-1] // net.patch, width, x.device)


class PostNorm(nn.Module):
    """A layer of the text encoder."""

    def __init__(self, layer: PostNormLayer) -> None:
        super().__init__()
        self.attn = PlainAttention(layer.attn)
        self.norm1, self.norm2, self.narrow, self.dropout = layer.norm1, layer.norm2, layer.narrow, layer.dropout
        self.up, self.down = layer.up, layer.down

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), mask (B, N) bool -> (B, N, D) or narrower."""
        x = self._norm(self.norm1, x + self.dropout(self.attn(x, mask)))
        x = self._norm(self.norm2, x + self.dropout(self.down(torch.relu(self.up(x)))))
        return x if self.narrow is None else self.narrow(x)

    @staticmethod
    def _norm(norm: UnbiasedNorm, x: Tensor) -> Tensor:
        mean, deviation = x.float().mean(-1, keepdim=True), x.float().std(-1, keepdim=True)
        return norm.g * (x - mean) / (deviation + 1e-5) + norm.b


class ReleasedTrunk(nn.Module):
    """The text variational encoder."""

    def __init__(self, product: TextVariationalTrunk) -> None:
        super().__init__()
        _make_plain(product)
        self.compressor, self.head = product.compressor, product.head
        self.latent_shape, self.by_token = product.latent_shape, product.by_token
        layers: Iterable[nn.Module] = [*product.layers, *product.reductions]
        self.layers = nn.ModuleList(PostNorm(layer) for layer in layers)  # type: ignore[arg-type]

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, N, D'), mask (B, N) bool -> (B, 2, *latent)."""
        x = features if self.compressor is None else self.compressor(features)
        for layer in self.layers:
            x = recomputed(layer, x, None if self.by_token else mask)
        if self.by_token:
            return torch.stack(self.head(x).chunk(2, dim=-1), dim=1)
        return self.head(x.flatten(1)).flatten(1).unflatten(1, (2, *self.latent_shape))


def _make_plain(network: nn.Module) -> None:
    """Puts torch's own linear maps, in the precision of autocast, in the place of the product's `SampleLinear`."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, SampleLinear):
                plain = nn.Linear(child.in_features, child.out_features, device="meta")
                plain.weight, plain.bias = child.weight, child.bias
                setattr(module, name, plain)
