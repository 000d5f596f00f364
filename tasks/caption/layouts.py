"""How a caption lies in a latent: encoders (ids -> both moments of the latent) and the decoders that read them.

`code`: a few numbers for the whole caption, drawn large. A flow has only these to hit; the fewer, the more often what
it hits is a sentence. `patches`: a share of the patches for each token. It holds any text and reads latents that
something else has made (the source latents of a text-to-image model), but a flow has to agree on a sentence word by
word. B batch, N tokens, V vocabulary, D width, C channels, H W height width, K numbers of the code, M patches, p
patch, k tokens per patch.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossflow.core.config import Section
from crossflow.core.layers import TransformerLayer, patchify, unpatchify
from crossflow.networks.text.trunk import TextTransformer, smallest_patch

MOST_PATCHES = 64
# A nearly exact code at first; the KL term widens it where it may.
FIRST_LOG_VAR = -4.0


class TextAutoencoderConfig(Section):
    """Sizes and losses of the text autoencoder."""

    max_length: int = Field(32, ge=2, le=512)
    """Tokens of a caption, `<eos>` included; longer ones are cut."""
    layout: Literal["auto", "code", "patches"] = "auto"
    """code: a few numbers for the whole caption; patches: a share of the latent's patches for each token; auto: code,
    but patches where the latent is made elsewhere (a text-to-image model run backwards)."""
    width: int = Field(128, ge=8)
    depth: int = Field(1, ge=1)
    """Layers of the encoder, and of the decoder."""
    encoder_depth: int | None = Field(None, ge=0)
    """Layers of the encoder alone, if not `depth`; 0: every token for itself, so that like captions have like latents.
    """
    heads: int = Field(4, ge=1)
    code_size: int = Field(160, ge=1)
    """Layout code: about how many numbers describe a caption (the nearest that the latent's shape allows). Fewer are
    easier to hit for a flow; long captions of a large vocabulary need more, some 500."""
    noise: float = Field(1.0, ge=0)
    """Largest standard deviation of the noise on the latent in training, where the latent has 1; drawn per caption."""
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of KL(posterior || N(0, I)), summed over the latent of a caption."""
    pad_weight: float = Field(0.1, ge=0, le=1)
    """Weight of the positions after `<eos>`, which are to be decoded as padding."""


def build_layout(
    layout: Literal["code", "patches"], vocab_size: int, latent_shape: tuple[int, ...], config: TextAutoencoderConfig
) -> tuple["CodeEncoder | PatchEncoder", "CodeDecoder | PatchDecoder"]:
    """The encoder (ids, mask) -> (B, 2, *latent) and the decoder of a layout."""
    if layout == "code":
        code = Code(latent_shape, config.code_size)
        return CodeEncoder(vocab_size, config, code), CodeDecoder(vocab_size, config, code)
    patches = Patches(latent_shape)
    return PatchEncoder(vocab_size, config, patches), PatchDecoder(vocab_size, config, patches)


def text_transformer(vocab_size: int, config: TextAutoencoderConfig) -> TextTransformer:
    """The transformer that reads captions, by the sizes of `config`."""
    return TextTransformer(
        vocab_size=vocab_size,
        max_length=config.max_length,
        width=config.width,
        depth=config.depth if config.encoder_depth is None else config.encoder_depth,
        heads=config.heads,
    )


class Code:
    """A few numbers drawn large: each fills a square of the grid (or a run of tokens), so that a flow sees smooth
    pictures.

    size: how many, about `size`; patch: side of the squares (length of the runs); shape: (C, H/p, W/p) or (N/p, C).
    """

    def __init__(self, latent_shape: tuple[int, ...], size: int) -> None:
        self.is_grid = len(latent_shape) == 3
        sides = latent_shape[1:] if self.is_grid else latent_shape[:1]
        common = math.gcd(*sides)
        total = math.prod(latent_shape)
        patches = [side for side in range(1, common + 1) if common % side == 0]
        self.patch = min(patches, key=lambda side: abs(math.log(total / side ** len(sides) / size)))
        small = tuple(side // self.patch for side in sides)
        self.shape = (latent_shape[0], *small) if self.is_grid else (*small, latent_shape[1])
        self.size = math.prod(self.shape)

    def draw(self, code: Tensor) -> Tensor:
        """(B, K) -> (B, *latent)."""
        grid = code.unflatten(1, self.shape)
        for dim in (2, 3) if self.is_grid else (1,):
            grid = grid.repeat_interleave(self.patch, dim)
        return grid

    def read(self, z: Tensor) -> Tensor:
        """(B, *latent) -> (B, K), the mean of each square: the inverse of `draw`, which averages what a flow adds
        to it.
        """
        if self.is_grid:
            return F.avg_pool2d(z, self.patch).flatten(1)
        return F.avg_pool1d(z.transpose(1, 2), self.patch).transpose(1, 2).flatten(1)


class CodeEncoder(nn.Module):
    """Token ids -> both moments of the latent, drawn from a code that a linear map makes of all tokens."""

    def __init__(self, vocab_size: int, config: TextAutoencoderConfig, code: Code) -> None:
        super().__init__()
        self.code = code
        self.transformer = text_transformer(vocab_size, config)
        self.mean = nn.Linear(config.max_length * config.width, code.size)
        self.log_var = nn.Linear(config.max_length * config.width, code.size)
        nn.init.zeros_(self.log_var.weight)
        nn.init.constant_(self.log_var.bias, FIRST_LOG_VAR)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, N) int64, mask (B, N) bool -> (B, 2, *latent)."""
        tokens = (self.transformer(ids, mask) * mask[..., None]).flatten(1)
        return torch.stack([self.code.draw(self.mean(tokens)), self.code.draw(self.log_var(tokens))], dim=1)


class CodeDecoder(nn.Module):
    """Latent -> code -> token logits in parallel: a linear map gives N output slots, which attend to one another."""

    def __init__(self, vocab_size: int, config: TextAutoencoderConfig, code: Code) -> None:
        super().__init__()
        width = config.width
        self.code = code
        self.slots = nn.Linear(code.size, config.max_length * width)
        self.queries = nn.Parameter(0.1 * torch.randn(config.max_length, width))
        self.layers = nn.ModuleList(TransformerLayer(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, z: Tensor) -> Tensor:
        """(B, *latent) -> (B, N, V)."""
        x = self.slots(self.code.read(z)).unflatten(1, self.queries.shape) + self.queries
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Noise on the code, drawn: what is white over the latent's elements is averaged away before it does harm."""
        return self.code.draw(torch.randn(count, self.code.size, generator=generator))


class Patches:
    """How a latent is cut: (B, *latent) <-> (B, M, E) with E elements per patch, at most 64 patches on a grid."""

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        self.latent_shape = latent_shape
        self.side, self.count, self.size = 1, latent_shape[0], latent_shape[-1]
        if len(latent_shape) == 3:
            channels, height, width = latent_shape
            self.side = smallest_patch(height, width, MOST_PATCHES)
            self.count = (height // self.side) * (width // self.side)
            self.size = channels * self.side**2

    def cut(self, z: Tensor) -> Tensor:
        """Latents (B, *latent) -> patches (B, count, size)."""
        return patchify(z, self.side) if len(self.latent_shape) == 3 else z

    def join(self, patches: Tensor) -> Tensor:
        """Patches (B, count, size) -> latents (B, *latent)."""
        return unpatchify(patches, self.side, *self.latent_shape[1:]) if len(self.latent_shape) == 3 else patches


class PatchEncoder(nn.Module):
    """Token ids -> both moments of the latent; tokens and patches are matched by a learned mixing that starts in
    order.
    """

    def __init__(self, vocab_size: int, config: TextAutoencoderConfig, patches: Patches) -> None:
        super().__init__()
        width = config.width
        self.patches = patches
        self.transformer = text_transformer(vocab_size, config)
        self.tokens_per_patch = math.ceil(config.max_length / patches.count)
        self.mixing = nn.Parameter(
            shares_of_tokens(config.max_length, patches.count * self.tokens_per_patch)
        )  # (M k, N)
        self.narrow = nn.Linear(self.tokens_per_patch * width, width)
        self.positions = nn.Parameter(0.1 * torch.randn(patches.count, width))
        self.mean = nn.Linear(width, patches.size)
        self.log_var = nn.Linear(width, patches.size)
        nn.init.zeros_(self.log_var.weight)
        nn.init.constant_(self.log_var.bias, FIRST_LOG_VAR)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, N) int64, mask (B, N) bool -> (B, 2, *latent)."""
        tokens = self.transformer(ids, mask) * mask[..., None]
        slots = self.mixing @ tokens  # (B, M k, D)
        x = self.narrow(slots.unflatten(1, (self.patches.count, -1)).flatten(2)) + self.positions
        return torch.stack([self.patches.join(self.mean(x)), self.patches.join(self.log_var(x))], dim=1)


class PatchDecoder(nn.Module):
    """Latent -> token logits in parallel: N output slots, each from its patches, attend to one another and to all
    patches.
    """

    def __init__(self, vocab_size: int, config: TextAutoencoderConfig, patches: Patches) -> None:
        super().__init__()
        width = config.width
        self.patches = patches
        self.tokens_per_patch = math.ceil(config.max_length / patches.count)
        self.embed = nn.Linear(patches.size, width)
        self.patch_positions = nn.Parameter(0.1 * torch.randn(patches.count, width))
        self.widen = nn.Linear(width, self.tokens_per_patch * width)
        shares = shares_of_tokens(config.max_length, patches.count * self.tokens_per_patch)
        self.mixing = nn.Parameter((shares / shares.sum(0).clamp(min=1)).T.contiguous())  # (N, M k)
        self.queries = nn.Parameter(0.1 * torch.randn(config.max_length, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.heads, context_dim=width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, z: Tensor) -> Tensor:
        """(B, *latent) -> (B, N, V)."""
        context = self.embed(self.patches.cut(z)) + self.patch_positions  # (B, M, D)
        slots = self.widen(context).unflatten(2, (self.tokens_per_patch, -1)).flatten(1, 2)  # (B, M k, D)
        x = self.mixing @ slots + self.queries
        for layer in self.layers:
            x = layer(x, context=context)
        return self.out(self.norm(x))

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """White noise over the latent's elements."""
        return torch.randn(count, *self.patches.latent_shape, generator=generator)


def shares_of_tokens(num_tokens: int, num_slots: int) -> Tensor:
    """(num_slots, num_tokens) of 0 and 1: slot j belongs to token floor(j num_tokens / num_slots)."""
    owner = torch.arange(num_slots) * num_tokens // num_slots
    return F.one_hot(owner, num_tokens).float()
