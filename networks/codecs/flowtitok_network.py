"""The networks of FlowTiTok: pictures (B, 3, H, W) <-> 77 tokens of 16 channels, decoded with a text's features as
guidance (FlowTok, arXiv 2503.10772, section 3.2; TA-TiTok, arXiv 2501.07730).

Encoder: transformer over [patches, latent tokens]; the latent tokens -> mean and log-variance. Decoder: transformer
over [mask tokens, tokens, text]; the mask tokens -> pixels. Patches have rotary positions, other tokens learned ones.
B batch, N tokens, G patches along a side, D width, C channels, H W height width.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import read_tensors, write_json, write_tensors
from crossflow.core.layers import Attention, patchify, unpatchify
from crossflow.core.weights import shapes_only

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
HEAD_WIDTH = 64


class Size(NamedTuple):
    """Depth and width of one of the two transformers."""

    depth: int
    width: int


SIZES = {
    "tiny": Size(2, 64),  # not published; for tests and trials
    "small": Size(8, 512),
    "base": Size(12, 768),
    "large": Size(24, 1024),
}


@dataclass(frozen=True)
class FlowTiTokConfig:
    """Sizes of a tokenizer; the defaults are those of the released one for 512 px.

    Raises UserError for unknown sizes and pixel ranges, and for patches that do not divide the image.
    """

    image_size: int = 512
    """Height and width in pixels."""
    encoder: str = "base"
    """A row of SIZES."""
    decoder: str = "large"
    """A row of SIZES."""
    patch: int = 16
    """Side of a patch in pixels."""
    num_tokens: int = 77
    """N, of the latent and of the text."""
    channels: int = 16
    """C of the latent tokens."""
    text_width: int = 768
    """Width of the text features that guide the decoder."""
    pixels: Literal["unit", "signed"] = "signed"
    """Range of the network's own pixels: unit, [0, 1], as the released tokenizers were trained; signed, [-1, 1]."""

    def __post_init__(self) -> None:
        for name in (self.encoder, self.decoder):
            if name not in SIZES:
                raise unknown_name("size of FlowTiTok", name, SIZES)
        if self.pixels not in ("unit", "signed"):
            raise unknown_name("range of pixels", self.pixels, ("unit", "signed"))
        if self.image_size % self.patch:
            raise UserError(f"image_size must be a multiple of patch = {self.patch}, got {self.image_size}.")


def rotary_tables(grid: int, width: int = HEAD_WIDTH) -> tuple[Tensor, Tensor]:
    """cos and sin of row-major grid positions, each (grid * grid, width): half of the channels encode the row, half
    the column.

    angle = position * 10000^(-2i/(width/2)) for each pair i of neighbouring channels.
    """
    half = width // 2
    omega = 1 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
    angle = (torch.arange(grid, dtype=torch.float32, device="cpu")[:, None] * omega).repeat_interleave(2, dim=1)
    both = torch.cat([angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (a, b) of neighbouring channels of the first tokens -> (a cos - b sin, b cos + a sin).

    x (B, heads, N, d), cos and sin (G, d), G <= N; tokens after the first G stay as they are.
    """
    patches, rest = x[:, :, : len(cos)], x[:, :, len(cos) :]
    a, b = patches.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-b, a], dim=-1).flatten(-2)
    return torch.cat([patches * cos + swapped * sin, rest], dim=2)


class RotaryAttention(Attention):
    """Self-attention with rotary positions on the queries and keys of the first tokens."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, N, D), cos and sin (G, 64) -> (B, N, D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(SiLU(gate) * value), [gate | value] = w12 x; hidden width 2/3 of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block, LayerNorm eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = RotaryAttention(width, max(1, width // HEAD_WIDTH))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D), cos and sin (G * G, 64) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """LayerNorm, blocks, LayerNorm; the first tokens lie on a grid of `grid` x `grid`."""

    cos: Tensor  # (G * G, 64)
    sin: Tensor

    def __init__(self, size: Size, grid: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.depth))
        self.norm_out = nn.LayerNorm(size.width)
        cos, sin = rotary_tables(grid)
        self.register_buffer("cos", cos)  # on the CPU even when the tower is built on the meta device
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, output: slice) -> Tensor:
        """x (B, N, D) -> (B, N', D), the tokens in `output`, normalised."""
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm_out(x[:, output])


class FlowTiTokEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> mean and log-variance of the tokens, (B, N, C) each."""

    def __init__(self, config: FlowTiTokConfig) -> None:
        super().__init__()
        size, self.patch = SIZES[config.encoder], config.patch
        self.embed = nn.Linear(3 * config.patch**2, size.width)
        self.tokens = nn.Parameter(torch.randn(config.num_tokens, size.width) * size.width**-0.5)
        self.positions = nn.Parameter(torch.randn(config.num_tokens, size.width) * size.width**-0.5)
        self.tower = Tower(size, config.image_size // config.patch)
        self.out = nn.Linear(size.width, 2 * config.channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in the network's range -> mean and log-variance, each (B, N, C)."""
        patches = self.embed(patchify(images, self.patch))  # (B, G * G, D)
        tokens = (self.tokens + self.positions).expand(images.shape[0], -1, -1)
        x = self.tower(torch.cat([patches, tokens], dim=1), slice(patches.shape[1], None))
        mean, log_var = self.out(x).chunk(2, dim=-1)
        return mean, log_var


class FlowTiTokDecoder(nn.Module):
    """Tokens (B, N, C) and text features (B, N', D') -> pictures (B, 3, H, W), not clamped."""

    def __init__(self, config: FlowTiTokConfig) -> None:
        super().__init__()
        size, self.patch, self.image_size = SIZES[config.decoder], config.patch, config.image_size
        self.grid = config.image_size // config.patch
        self.mask_token = nn.Parameter(torch.randn(size.width) * size.width**-0.5)
        self.embed = nn.Linear(config.channels, size.width)
        self.positions = nn.Parameter(torch.randn(config.num_tokens, size.width) * size.width**-0.5)
        self.embed_text = nn.Linear(config.text_width, size.width)
        self.text_positions = nn.Parameter(torch.randn(config.num_tokens, size.width) * size.width**-0.5)
        self.tower = Tower(size, self.grid)
        self.out = nn.Linear(size.width, 3 * config.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, tokens: Tensor, text_features: Tensor) -> Tensor:
        """tokens (B, N, C), text_features (B, N, D') -> images (B, 3, H, W) in the network's range, not clamped."""
        masked = self.mask_token.expand(tokens.shape[0], self.grid**2, -1)  # (B, G * G, D)
        text = self.embed_text(text_features) + self.text_positions
        x = torch.cat([masked, self.embed(tokens) + self.positions, text], dim=1)
        x = self.out(self.tower(x, slice(self.grid**2)))
        return self.smooth(unpatchify(x, self.patch, self.image_size, self.image_size))


class FlowTiTok(nn.Module):
    """The tokenizer's two networks, saved as config.json and model.safetensors."""

    def __init__(self, config: FlowTiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FlowTiTokEncoder(config)
        self.decoder = FlowTiTokDecoder(config)

    def save_config(self, folder: Path) -> None:
        """Writes config.json to an existing folder."""
        write_json(folder / CONFIG_FILE, asdict(self.config))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors to `folder`, which is created if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The network that `save_pretrained` wrote. Raises UserError for missing, damaged or mismatched files."""
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{folder} holds no FlowTiTok: expected {CONFIG_FILE} and {WEIGHTS_FILE}, which `crossflow convert` "
                "writes from the released file."
            )
        try:
            config = FlowTiTokConfig(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
            with shapes_only():
                network = cls(config)
            network.load_state_dict(read_tensors(folder / WEIGHTS_FILE), assign=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"The FlowTiTok in {folder} cannot be read: {' '.join(str(error).split())[:300]}"
            ) from error
        return network
