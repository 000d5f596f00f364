"""The released codecs: FlowTiTok, and Stable Diffusion's autoencoder under its original (latent diffusion) keys."""

import logging
from collections.abc import Callable, Collection, Mapping
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.flowtitok_network import FlowTiTok, FlowTiTokConfig, rotary_tables
from crossflow.released.kinds import KINDS, Kind, ReferenceConfig
from crossflow.released.rules import Rule

logger = logging.getLogger(__name__)
CROSSFLOW_SCALE = 0.23010
"""Factor on the autoencoder's latents in the released CrossFlow models."""
NUM_LEVELS = 4
"""Number of resolutions of the autoencoder."""


# -- layouts of single tensors


def _matrix(conv: Tensor) -> Tensor:
    return conv.flatten(1)


def _conv_1x1(matrix: Tensor, count: int) -> tuple[Tensor, ...]:
    return (matrix[..., None, None],)


def _vector(leading: Tensor) -> Tensor:
    return leading.flatten()


def _leading(vector: Tensor, count: int) -> tuple[Tensor, ...]:
    return (vector[None, None],)


def _patch_matrix(conv: Tensor) -> Tensor:
    """(D, 3, p, p) -> (D, p * p * 3), colour fastest, the order of `core.layers.patchify`."""
    return conv.permute(0, 2, 3, 1).flatten(1).contiguous()


def _patch_conv(matrix: Tensor, count: int) -> tuple[Tensor, ...]:
    patch = isqrt(matrix.shape[1] // 3)
    return (matrix.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2).contiguous(),)


def _rotary(function: Literal["cos", "sin"]) -> Callable[[Tensor], Tensor]:
    """A `join` that computes the rotary table, and warns when the file's table differs."""

    def table(stored: Tensor) -> Tensor:
        cos, sin = rotary_tables(isqrt(len(stored)), stored.shape[1])
        computed = cos if function == "cos" else sin
        if stored.device.type != "meta" and not torch.allclose(stored.float().cpu(), computed, atol=1e-4):
            logger.warning("The file's rotary tables (%s) do not fit its grid; computed ones are used.", function)
        return computed.to(stored.device)

    return table


def _section(config: ReferenceConfig, name: str, required: str) -> Mapping[str, Any]:
    """A section of the reference's settings. Raises UserError when one of the `required` settings is missing."""
    section = config.get(name)
    present = section if isinstance(section, Mapping) else None
    missing = [name] if present is None else [setting for setting in required.split() if setting not in present]
    if missing:
        raise UserError(
            f"The config of this released codec lacks {', '.join(missing)}. Give the reference's own settings, with "
            f"{', '.join(required.split())} under {name}."
        )
    assert isinstance(section, Mapping)
    return section


# -- FlowTiTok


def _build_flowtitok(config: ReferenceConfig, keys: Collection[str]) -> nn.Module:
    network = FlowTiTok(flowtitok_config(config))
    with torch.device("cpu"):  # the network may be on the meta device; the scale is not in the file
        return FlowTiTokCodec(network)


def flowtitok_config(config: ReferenceConfig) -> FlowTiTokConfig:
    """The sizes of the tokenizer from the reference's settings (`vq_model`, `dataset.crop_size`).

    The range of pixels stays [-1, 1]; `crossflow convert` sets the range of training, [0, 1], with the scale.
    Raises UserError for variants that were not released.
    """
    model = _section(
        config,
        "vq_model",
        "vit_enc_model_size vit_dec_model_size vit_enc_patch_size vit_dec_patch_size num_latent_tokens token_size",
    )
    image_size = _section(config, "dataset", "crop_size")["crop_size"]
    fixed = {"is_legacy": False, "use_rmsnorm": False, "use_swiglu": True, "deterministic": False}
    other = [f"{name} = {model[name]}" for name, value in fixed.items() if model.get(name, value) != value]
    if model["vit_enc_patch_size"] != model["vit_dec_patch_size"]:
        other.append("different patch sizes of encoder and decoder")
    if other:
        raise UserError(f"No FlowTiTok with {' and '.join(other)} was released, so it is not supported.")
    return FlowTiTokConfig(
        image_size=int(image_size),
        encoder=model["vit_enc_model_size"],
        decoder=model["vit_dec_model_size"],
        patch=model["vit_enc_patch_size"],
        num_tokens=model["num_latent_tokens"],
        channels=model["token_size"],
    )


_SIDE = r"network\.(encoder|decoder)\."
_BLOCK = _SIDE + r"tower\.blocks\.(\d+)\."
_LINEAR = r"(weight|bias)"

FLOWTITOK_RULES = (
    Rule(r"network\.encoder\.tokens", ("latent_tokens",)),
    Rule(_SIDE + "positions", (r"\1.latent_token_positional_embedding",)),
    Rule(r"network\.decoder\.text_positions", ("decoder.text_guidance_positional_embedding",)),
    Rule(r"network\.decoder\.mask_token", ("decoder.mask_token",), _vector, _leading),
    Rule(r"network\.encoder\.embed\.weight", ("encoder.patch_embed.weight",), _patch_matrix, _patch_conv),
    Rule(r"network\.encoder\.embed\.bias", ("encoder.patch_embed.bias",)),
    Rule(rf"network\.decoder\.embed\.{_LINEAR}", (r"decoder.decoder_embed.\1",)),
    Rule(rf"network\.decoder\.embed_text\.{_LINEAR}", (r"decoder.text_guidance_proj.\1",)),
    *(
        Rule(
            rf"{_SIDE}tower\.{part}",
            (rf"\1.positional_embedding.freqs_{part}",),
            join=_rotary(part),
            optional=True,
        )
        for part in ("cos", "sin")
    ),
    Rule(rf"{_SIDE}tower\.norm_in\.{_LINEAR}", (r"\1.ln_pre.\2",)),
    Rule(rf"{_SIDE}tower\.norm_out\.{_LINEAR}", (r"\1.ln_post.\2",)),
    Rule(rf"{_BLOCK}norm([12])\.{_LINEAR}", (r"\1.transformer.\2.ln_\3.\4",)),
    Rule(rf"{_BLOCK}attn\.qkv\.{_LINEAR}", (r"\1.transformer.\2.attn.qkv.\3",)),
    Rule(rf"{_BLOCK}attn\.out\.{_LINEAR}", (r"\1.transformer.\2.attn.proj.\3",)),
    Rule(rf"{_BLOCK}mlp\.(w12|w3)\.{_LINEAR}", (r"\1.transformer.\2.mlp.\3.\4",)),
    Rule(r"network\.encoder\.out\.weight", ("encoder.conv_out.weight",), _matrix, _conv_1x1),
    Rule(r"network\.encoder\.out\.bias", ("encoder.conv_out.bias",)),
    Rule(r"network\.decoder\.out\.weight", ("decoder.ffn.0.weight",), _matrix, _conv_1x1),
    Rule(r"network\.decoder\.out\.bias", ("decoder.ffn.0.bias",)),
    Rule(rf"network\.decoder\.smooth\.{_LINEAR}", (r"decoder.conv_out.\1",)),
)


# -- Stable Diffusion's autoencoder


def _build_autoencoder(config: ReferenceConfig, keys: Collection[str]) -> nn.Module:
    """diffusers' `AutoencoderKL` for the reference's own settings (`ddconfig`, `scale_factor`)."""
    from diffusers import AutoencoderKL

    nested = config if "ddconfig" in config else {"ddconfig": config}
    settings = _section(nested, "ddconfig", "ch ch_mult in_channels out_ch num_res_blocks z_channels")
    widths = tuple(settings["ch"] * factor for factor in settings["ch_mult"])
    if settings.get("attn_resolutions") or not settings.get("double_z", True) or len(widths) != NUM_LEVELS:
        raise UserError(
            f"A KL autoencoder must have {NUM_LEVELS} resolutions (ch_mult), a variance (double_z), and attention only "
            "in the middle (attn_resolutions empty), as Stable Diffusion's has."
        )
    network = AutoencoderKL(
        in_channels=settings["in_channels"],
        out_channels=settings["out_ch"],
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * NUM_LEVELS,
        up_block_types=("UpDecoderBlock2D",) * NUM_LEVELS,
        layers_per_block=settings["num_res_blocks"],
        latent_channels=settings["z_channels"],
        sample_size=settings.get("resolution", 256),
        scaling_factor=float(config.get("scale_factor", CROSSFLOW_SCALE)),
    )
    with torch.device("cpu"):
        return AutoencoderKLCodec(network)


def _residual_rules(pattern: str, key: str) -> tuple[Rule, ...]:
    """The rules of a residual block; `key` may refer to the groups of `pattern`."""
    group = pattern.count("(") + 1  # the first group after those of `pattern`
    return (
        Rule(rf"{pattern}\.(norm|conv)([12])\.{_LINEAR}", (rf"{key}.\{group}\{group + 1}.\{group + 2}",)),
        Rule(rf"{pattern}\.conv_shortcut\.{_LINEAR}", (rf"{key}.nin_shortcut.\{group}",)),
    )


AUTOENCODER_RULES = (
    Rule(rf"{_SIDE}conv_(in|out)\.{_LINEAR}", (r"\1.conv_\2.\3",)),
    Rule(rf"{_SIDE}conv_norm_out\.{_LINEAR}", (r"\1.norm_out.\2",)),
    Rule(rf"network\.(quant_conv|post_quant_conv)\.{_LINEAR}", (r"\1.\2",)),
    *_residual_rules(r"network\.encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    Rule(
        rf"network\.encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.{_LINEAR}",
        (r"encoder.down.\1.downsample.conv.\2",),
    ),
    *(  # the reference counts the decoder's resolutions from the other end
        rule
        for level in range(NUM_LEVELS)
        for pattern, key in ((rf"network\.decoder\.up_blocks\.{level}", rf"decoder.up.{NUM_LEVELS - 1 - level}"),)
        for rule in (
            *_residual_rules(rf"{pattern}\.resnets\.(\d)", rf"{key}.block.\1"),
            Rule(rf"{pattern}\.upsamplers\.0\.conv\.{_LINEAR}", (rf"{key}.upsample.conv.\1",)),
        )
    ),
    *_residual_rules(rf"{_SIDE}mid_block\.resnets\.0", r"\1.mid.block_1"),
    *_residual_rules(rf"{_SIDE}mid_block\.resnets\.1", r"\1.mid.block_2"),
    Rule(rf"{_SIDE}mid_block\.attentions\.0\.group_norm\.{_LINEAR}", (r"\1.mid.attn_1.norm.\2",)),
    Rule(rf"{_SIDE}mid_block\.attentions\.0\.to_([qkv])\.weight", (r"\1.mid.attn_1.\2.weight",), _matrix, _conv_1x1),
    Rule(rf"{_SIDE}mid_block\.attentions\.0\.to_([qkv])\.bias", (r"\1.mid.attn_1.\2.bias",)),
    Rule(
        rf"{_SIDE}mid_block\.attentions\.0\.to_out\.0\.weight", (r"\1.mid.attn_1.proj_out.weight",), _matrix, _conv_1x1
    ),
    Rule(rf"{_SIDE}mid_block\.attentions\.0\.to_out\.0\.bias", (r"\1.mid.attn_1.proj_out.bias",)),
)

KINDS.register("flowtitok")(Kind(build=_build_flowtitok, rules=FLOWTITOK_RULES))
KINDS.register("autoencoder_kl")(
    Kind(
        build=_build_autoencoder,
        rules=AUTOENCODER_RULES,
        dropped={r"loss\..*": "the training losses of the autoencoder (perceptual network, discriminator)"},
    )
)
