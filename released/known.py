"""The released files: the tensors that identify each, and its settings by the names of the reference's config."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.settings import read_yaml
from crossflow.released.kinds import KINDS, ReferenceConfig, kind_named


@dataclass(frozen=True)
class Known:
    """A released file."""

    name: str
    kind: str
    marks: Mapping[str, Sequence[int]]
    """Tensors, with their shapes, that no other kind or size has."""
    config: ReferenceConfig
    """The reference's own settings."""


def _text(num_blocks: int) -> dict[str, Any]:
    return {
        "num_blocks": num_blocks,
        "hidden_dim": 1024,
        "hidden_token_length": 256,
        "num_attention_heads": 8,
        "dropout_prob": 0.1,
    }


def _crossflow(text_width: int, cfg_indicator: float, backbone: dict[str, Any]) -> dict[str, Any]:
    return {
        "channels": 4,
        "block_grad_to_lowres": False,
        "norm_type": "TDRMSN",
        "use_t2i": True,
        "clip_dim": text_width,
        "num_clip_token": 77,
        "cfg_indicator": cfg_indicator,
        "textVAE": _text(11),
        **backbone,
    }


def _stage(block: str, dim: int, num_blocks: int, side: int, ratio: int) -> dict[str, Any]:
    return {
        "block_type": block,
        "dim": dim,
        "hidden_dim": 2 * dim,
        "num_blocks": num_blocks,
        "max_height": side,
        "max_width": side,
        "image_input_ratio": 1,
        "input_feature_ratio": ratio,
        "final_kernel_size": 3,
        "dropout_prob": 0,
    }


def _stages(latent_size: int) -> list[dict[str, Any]]:
    """The stages of DiMR from 16 x 16 to the latent's size; each has half the width of the one before."""
    first = _stage("TransformerBlock", 1024, 65, 16, latent_size // 16) | {"num_attention_heads": 16}
    sides = [side for side in (32, 64) if side <= latent_size]
    later = [_stage("ConvNeXtBlock", 512 * 32 // side, 33, side, latent_size // side) for side in sides]
    return [first, *(stage | {"kernel_size": 7} for stage in later)]


def _flowtok(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "learn_sigma": False,
        "channels": 16,
        "use_t2i": True,
        "clip_dim": 768,
        "num_clip_token": 77,
        "cfg_indicator": 0.1,
        "noising_type": "none",
        "textVAE": _text(6) | {"clip_loss_weight": 0.0},
        "use_t2t_temperature": True,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
    }


_DIMR_256 = {"loss_coeffs": [0.25, 1], "stage_configs": _stages(32)}
_DIMR_512 = {"loss_coeffs": [0.25, 0.5, 1], "stage_configs": _stages(64)}
_DIT = {"latent_size": 64, "learn_sigma": False, "patch_size": 2, "hidden_size": 1280, "depth": 36, "num_heads": 20}
_TITOK = {
    "vq_model": {
        "deterministic": False,
        "token_size": 16,
        "vit_enc_model_size": "base",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 77,
        "is_legacy": False,
        "use_rmsnorm": False,
        "use_swiglu": True,
        "scale_factor": 1.0143,
    }
}
_TITOK_MARKS = {"latent_tokens": (77, 768), "decoder.mask_token": (1, 1, 1024)}
_GRID = "encoder.positional_embedding.freqs_cos"
_XL_STAGE, _LAST_STAGE = {"stages.0.blocks.64.block1.dense.weight": (1024, 1024)}, "stages.2.blocks.32.block1.1.weight"
_LINEAR, _ADAPTOR = "context_encoder.linear.weight", "context_encoder.adaptor.fc1.weight"

FILES = (
    Known("t2i_256px_clip_dimr", "dimr", _XL_STAGE | {_LINEAR: (8192, 7392)}, _crossflow(768, 0.1, _DIMR_256)),
    Known("t2i_256px_t5_dimr", "dimr", _XL_STAGE | {_LINEAR: (8192, 9856)}, _crossflow(4096, 0.1, _DIMR_256)),
    Known(
        "t2i_512px_clip_dimr",
        "dimr",
        {_LAST_STAGE: (256, 1, 7, 7), _ADAPTOR: (4096, 7392)},
        _crossflow(768, 0.15, _DIMR_512),
    ),
    Known(
        "t2i_512px_t5_dimr",
        "dimr",
        {_LAST_STAGE: (256, 1, 7, 7), _ADAPTOR: (4096, 9856)},
        _crossflow(4096, 0.15, _DIMR_512),
    ),
    Known(
        "t2i_512px_t5_dit",
        "dit",
        {"x_embedder.proj.weight": (1280, 4, 2, 2), _ADAPTOR: (4096, 9856)},
        _crossflow(4096, 0.1, _DIT),
    ),
    Known("FlowTok-XL", "flowtok", {"x_embedder.weight": (1152, 16), _LINEAR: (32, 768)}, _flowtok(1152, 28, 16)),
    Known("FlowTok-H", "flowtok", {"x_embedder.weight": (1280, 16), _LINEAR: (32, 768)}, _flowtok(1280, 36, 20)),
    Known("FlowTiTok-512", "flowtitok", _TITOK_MARKS | {_GRID: (1024, 64)}, _TITOK | {"dataset": {"crop_size": 512}}),
    Known("FlowTiTok-256", "flowtitok", _TITOK_MARKS | {_GRID: (256, 64)}, _TITOK | {"dataset": {"crop_size": 256}}),
    Known(
        "the autoencoder of Stable Diffusion",
        "autoencoder_kl",
        {"encoder.down.3.block.1.conv2.weight": (512, 512, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
        {
            "scale_factor": 0.23010,
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 256,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 2, 4, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        },
    ),
)


def recognise(tensors: Mapping[str, Tensor]) -> Known | None:
    """The released file with these tensors, of which only shapes are read; None for any other."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    matches = [known for known in FILES if all(shapes.get(key) == tuple(shape) for key, shape in known.marks.items())]
    return matches[0] if len(matches) == 1 else None


def identify(tensors: Mapping[str, Tensor], kind: str | None, config: ReferenceConfig | None, path: Path) -> Known:
    """The identity of the file at `path`: one of the released files, or the given kind and config.

    Raises UserError when it is unknown and kind or config is missing, and when it contradicts `kind`.
    """
    released = recognise(tensors)
    if kind is not None:
        kind_named(kind)  # raises the error that lists the kinds
    if released is not None and kind not in (None, released.kind):
        raise UserError(f"{path} is {released.name}, of the kind {released.kind!r}, not {kind!r}. Leave --kind out.")
    if kind is not None and config is not None:
        return Known(path.stem, kind, {}, config)
    if released is not None:
        return released if config is None else Known(path.stem, released.kind, {}, config)
    kind_named("dimr")
    raise UserError(
        f"{path} ({len(tensors)} tensors, the first {next(iter(tensors), 'none')!r}) is not one of the released files "
        f"({', '.join(known.name for known in FILES)}). For another network of these kinds, give --kind "
        f"({', '.join(KINDS.names())}) and --config, a JSON or YAML file of the reference's own settings."
    )


def read_config(path: Path) -> tuple[str | None, ReferenceConfig]:
    """Kind, if the file names it, and the reference's settings, from JSON or YAML: the settings alone, or
    {"kind": ..., "config": ...}. Raises UserError for an unreadable file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_yaml(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"Expected a mapping, the settings of a reference network, in {path}, got {type(content).__name__}."
        )
    if isinstance(content.get("config"), dict):
        kind = content.get("kind")
        return None if kind is None else str(kind), content["config"]
    return None, content
