"""The released flow models: CrossFlow on DiMR and on DiT, and FlowTok.

Each is a configuration of the text-to-image task: the reference's settings become a recipe, the recipe builds the
network and its objective, and rules map the names of their tensors to the keys of the released file.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.objective import Objective
from crossflow.core.settings import build
from crossflow.released.kinds import KINDS, Kind, ReferenceConfig
from crossflow.released.rules import Rule
from crossflow.tasks import task_class

CLIP, CLIP_336, T5 = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336", "google/t5-v1_1-xxl"
TOWER = "google/siglip-large-patch16-256"
TOWER_WIDTH = 1024
T5_WIDTH, T5_SCALE, COMPRESSED_WIDTH = 4096, 10.0, 1024
CROSSFLOW_SCALE, FLOWTOK_SCALE = 0.23010, 1.0143
PIXELS_PER_LATENT = 8
Recipe = Callable[[ReferenceConfig, Collection[str]], dict[str, Any]]
"""(reference's config, keys of the file) -> settings of a recipe."""
FLOWTOK_PIXELS = 512
"""Image size of the tokenizer that the released FlowTok models were trained with."""


# -- from the reference's settings to a recipe


def _setting(config: ReferenceConfig, name: str) -> Any:
    """The setting `name`, such as "textVAE.num_blocks", of the reference. Raises UserError when it is missing."""
    value: Any = config
    for part in name.split("."):
        if not hasattr(value, "keys") or part not in value:
            raise UserError(
                f"The config of this released model lacks {name!r}. Give the reference's own settings, including "
                "textVAE, clip_dim, num_clip_token and those of its backbone."
            )
        value = value[part]
    return value


def _expect(config: ReferenceConfig, **released: bool | int | str) -> None:
    """Raises UserError for settings other than the released ones."""
    other = [f"{name} = {config[name]!r}" for name, value in released.items() if config.get(name, value) != value]
    if other:
        raise UserError(f"No reference network with {' and '.join(other)} was released, so it is not supported.")


def _common(config: ReferenceConfig, sample: dict[str, Any]) -> dict[str, Any]:
    """The part of the recipe that the three kinds share."""
    feature_width = _setting(config, "clip_dim")
    return {
        "task": "t2i",
        "text": {"feature_width": feature_width, "max_length": _setting(config, "num_clip_token")},
        "source": {
            "kind": "variational",
            "trunk": "released",
            "width": COMPRESSED_WIDTH if feature_width == T5_WIDTH else feature_width,
            "depth": _setting(config, "textVAE.num_blocks"),
            "hidden": _setting(config, "textVAE.hidden_dim"),
            "heads": _setting(config, "textVAE.num_attention_heads"),
            "dropout": _setting(config, "textVAE.dropout_prob"),
        },
        "loss": {"kl": "released", "kl_weight": 1e-2, "encoder": "contrastive"},
        "guidance": {"drop": _setting(config, "cfg_indicator")},
        "sample": {"solver": "euler", "time_grid": "released", **sample},
    }


def _crossflow(config: ReferenceConfig, keys: Collection[str], latent_size: int) -> dict[str, Any]:
    """The recipe of the CrossFlow models without the backbone."""
    if _setting(config, "channels") != 4:
        raise UserError(f"The released CrossFlow models have latents of 4 channels, got {config['channels']}.")
    adaptor = any(key.startswith("context_encoder.adaptor.") for key in keys)
    settings = _common(config, {"steps": 50, "guidance": 7.0})
    encoders: dict[int, dict[str, Any]] = {768: {"encoder": CLIP}, T5_WIDTH: {"encoder": T5, "scale": T5_SCALE}}
    settings["text"] |= {"head": "adaptor" if adaptor else "flatten"} | encoders.get(_setting(config, "clip_dim"), {})
    settings["data"] = {"image_size": PIXELS_PER_LATENT * latent_size}
    settings["codec"] = {"kind": "autoencoder_kl", "scale": CROSSFLOW_SCALE}
    settings["tower"] = {"source": TOWER, "width": TOWER_WIDTH, "head": "adaptor" if adaptor else "mlp"}
    settings["loss"] |= {"encoder_target": "image"}
    return settings


def dimr_settings(config: ReferenceConfig, keys: Collection[str]) -> dict[str, Any]:
    """The recipe of CrossFlow on DiMR. Raises UserError for variants that were not released."""
    _expect(config, norm_type="TDRMSN", block_grad_to_lowres=False)
    stages = _setting(config, "stage_configs")
    kinds = [_setting(stage, "block_type") for stage in stages]
    if kinds != ["TransformerBlock"] + ["ConvNeXtBlock"] * (len(stages) - 1):
        raise UserError(
            "The stages of a released DiMR must be one TransformerBlock and then ConvNeXtBlocks, got "
            f"{', '.join(kinds) or 'none'}."
        )
    for stage in stages:
        _expect(stage, kernel_size=7, final_kernel_size=3, pe_type="APE", norm_type="TDRMSN")
    last = stages[-1]
    size = _setting(last, "max_height") * _setting(last, "input_feature_ratio") * _setting(last, "image_input_ratio")
    settings = _crossflow(config, keys, size)
    settings["loss"] |= {"coefficients": tuple(config.get("loss_coeffs", ()))}
    return settings | {
        "backbone": {
            "name": "dimr",
            "stages": [
                {
                    "width": _setting(stage, "dim"),
                    "hidden": _setting(stage, "hidden_dim"),
                    "depth": _setting(stage, "num_blocks"),
                    "heads": stage.get("num_attention_heads", 1),
                    "patch": _setting(stage, "input_feature_ratio"),
                    "pool": _setting(stage, "image_input_ratio"),
                }
                for stage in stages
            ],
        },
    }


def _dit_backbone(config: ReferenceConfig) -> dict[str, Any]:
    _expect(config, learn_sigma=False)
    names = {"width": "hidden_size", "depth": "depth", "heads": "num_heads"}
    sizes = {name: _setting(config, reference_name) for name, reference_name in names.items()}
    return {"name": "dit", **sizes, "positions": "stored", "time_scale": 1.0}


def dit_settings(config: ReferenceConfig, keys: Collection[str]) -> dict[str, Any]:
    """The recipe of CrossFlow on DiT. Raises UserError for variants that were not released."""
    backbone = _dit_backbone(config) | {"patch": _setting(config, "patch_size")}
    return _crossflow(config, keys, _setting(config, "latent_size")) | {"backbone": backbone}


def flowtok_settings(config: ReferenceConfig, keys: Collection[str]) -> dict[str, Any]:
    """The recipe of FlowTok. Raises UserError for variants that were not released."""
    _expect(config, channels=16, num_clip_token=77, use_t2t_temperature=True, noising_type="none")
    settings = _common(config, {"steps": 20, "guidance": 2.0})
    settings["text"] |= {"head": "tokens", "pad_id": 0} | ({"encoder": CLIP_336} if config["clip_dim"] == 768 else {})
    settings["data"] = {"image_size": FLOWTOK_PIXELS}
    settings["codec"] = {"kind": "flowtitok", "scale": FLOWTOK_SCALE}
    settings["loss"] |= {"encoder_target": "tokens", "kl_reduction": "sum"}
    return settings | {"backbone": _dit_backbone(config)}


def _builder(settings: Recipe) -> Callable[[ReferenceConfig, Collection[str]], CrossFlow]:
    """`Kind.build` for the kind whose recipe `settings` returns."""

    def make(config: ReferenceConfig, keys: Collection[str]) -> CrossFlow:
        kind = task_class("t2i")
        task = kind.outline(build(kind.Config, settings(config, keys)))
        model = task.build_model()
        model.remember_objective(task.build_objective(model))
        return model

    return make


def _set_temperature(model: nn.Module) -> None:
    """Sets the contrastive temperature to its usual initial value if the file has none."""
    objective = model.objective if isinstance(model, CrossFlow) else None
    assert isinstance(objective, Objective)
    if objective.log_temperature.is_meta and not next(model.parameters()).is_meta:
        objective.log_temperature = nn.Parameter(-torch.tensor(objective.settings.temperature).log())


# -- from tensor names to reference keys


def _text_layer(pattern: str, key: str) -> Iterator[Rule]:
    """A layer of the text encoder; the reference has three projections for queries, keys and values instead of one."""
    for leaf in ("weight", "bias"):
        projections = tuple(rf"{key}.attn.{name}.{leaf}" for name in ("W_Q", "W_K", "W_V"))
        yield Rule(rf"{pattern}\.attn\.qkv\.{leaf}", projections)
    for module, name in (("attn.out", "attn.W_O"), ("up", "feed_forward.ffn_1"), ("down", "feed_forward.ffn_2")):
        yield Rule(rf"{pattern}\.{module}\.(weight|bias)", (rf"{key}.{name}.\2",))
    yield Rule(rf"{pattern}\.narrow\.(weight|bias)", (rf"{key}.reduction.\2",))
    yield Rule(rf"{pattern}\.(norm[12])\.(g|b)", (rf"{key}.\2.\3",))


def _renamed(names: dict[str, str]) -> Iterator[Rule]:
    """Modules with a weight and a bias that only differ by name: {pattern: key}."""
    for pattern, key in names.items():
        yield Rule(rf"{pattern}\.(weight|bias)", (rf"{key}.\1",))


ADAPTOR = {name: name for name in ("fc1", "fc2", "conv1", "conv2", "conv3")}
ADAPTOR |= {"norm1": "ln_fc1", "norm2": "ln_fc2", "norm3": "ln_conv1", "norm4": "ln_conv2"}
TRUNK = r"source_encoder\.trunk"
TEXT = (
    *_text_layer(rf"{TRUNK}\.layers\.(\d+)", r"context_encoder.layers.\1"),
    *_text_layer(rf"{TRUNK}\.reductions\.(\d+)", r"context_encoder.reduction_layers.\1"),
    *_renamed(
        {
            rf"{TRUNK}\.compressor\.0": "context_encoder.compressor.fc1",
            rf"{TRUNK}\.compressor\.1": "context_encoder.compressor.ln_fc1",
            rf"{TRUNK}\.compressor\.3": "context_encoder.compressor.fc2",
            rf"{TRUNK}\.head": "context_encoder.linear",
            **{rf"{TRUNK}\.head\.{name}": f"context_encoder.adaptor.{key}" for name, key in ADAPTOR.items()},
        }
    ),
)
IMAGE_HEAD = (
    *_renamed(
        {
            r"objective\.alignment_head\.norm": "open_clip_output.norm",
            **{rf"objective\.alignment_head\.{name}": f"open_clip_output.{key}" for name, key in ADAPTOR.items()},
        }
    ),
    Rule(r"objective\.log_temperature", ("open_clip.logit_scale",), optional=True),
)
TEXT_HEAD = (
    Rule(r"objective\.alignment_head\.(\d)\.(weight|bias)", (r"context_projector.\1.\2",)),
    Rule(r"objective\.log_temperature", ("t2t_temperature",)),
)

TIME = r"(param0|param1|nodecay_weight|nodecay_bias)"
STAGE, STAGE_KEY = r"backbone\.stages\.(\d+)", r"stages.\1"
BLOCK, BLOCK_KEY = rf"{STAGE}\.blocks\.(\d+)", rf"{STAGE_KEY}.blocks.\2"
DIMR = (
    Rule(rf"{STAGE}\.unconditional", (rf"{STAGE_KEY}.tensor_true",)),
    Rule(rf"{STAGE}\.conditional", (rf"{STAGE_KEY}.tensor_false",)),
    Rule(rf"{STAGE}\.embed\.(weight|bias)", (rf"{STAGE_KEY}.input_layer.1.\2",)),
    Rule(rf"{STAGE}\.positions", (rf"{STAGE_KEY}.input_layer.3.position_embeddings.weight",)),
    Rule(rf"{STAGE}\.upsample\.norm_in\.(weight|bias)\.{TIME}", (rf"{STAGE_KEY}.upsample.0.\2.\3",)),
    Rule(rf"{STAGE}\.upsample\.linear\.(weight|bias)", (rf"{STAGE_KEY}.upsample.1.kernel.\2",)),
    Rule(rf"{STAGE}\.upsample\.norm_out\.(weight|bias)\.{TIME}", (rf"{STAGE_KEY}.upsample.2.\2.\3",)),
    Rule(rf"{STAGE}\.skips\.(\d+)\.(weight|bias)", (rf"{STAGE_KEY}.skip_denses.\2.\3",)),
    Rule(rf"{STAGE}\.norm\.(weight|bias)\.{TIME}", (rf"{STAGE_KEY}.output_layer.0.\2.\3",)),
    Rule(rf"{STAGE}\.out\.(weight|bias)", (rf"{STAGE_KEY}.output_layer.2.\2",)),
    Rule(rf"{BLOCK}\.norm1\.scale\.{TIME}", (rf"{BLOCK_KEY}.block1.norm.scale.\3",)),
    Rule(rf"{BLOCK}\.attn\.qkv\.weight", (rf"{BLOCK_KEY}.block1.query_key_value.weight",)),
    Rule(rf"{BLOCK}\.attn\.out\.(weight|bias)", (rf"{BLOCK_KEY}.block1.dense.\3",)),
    Rule(rf"{BLOCK}\.conv\.(weight|bias)", (rf"{BLOCK_KEY}.block1.1.\3",)),
    Rule(rf"{BLOCK}\.(?:norm|norm2)\.scale\.{TIME}", (rf"{BLOCK_KEY}.block2.norm.scale.\3",)),
    Rule(rf"{BLOCK}\.mlp\.gate\.(weight|bias)", (rf"{BLOCK_KEY}.block2.w0.\3",)),
    Rule(rf"{BLOCK}\.mlp\.value\.(weight|bias)", (rf"{BLOCK_KEY}.block2.w1.\3",)),
    Rule(rf"{BLOCK}\.mlp\.out\.(weight|bias)", (rf"{BLOCK_KEY}.block2.w2.\3",)),
)


def _as_linear(conv: Tensor) -> Tensor:
    """The patch convolution (D, C, p, p) as a linear map of patches (p_h, p_w, C), C fastest."""
    return conv.permute(0, 2, 3, 1).flatten(1)


def _as_conv(linear: Tensor, count: int) -> tuple[Tensor, ...]:
    """The inverse of `_as_linear` for latents of 4 channels."""
    patch = round((linear.shape[1] / 4) ** 0.5)
    return (linear.unflatten(1, (patch, patch, 4)).permute(0, 3, 1, 2).contiguous(),)


def _without_batch(table: Tensor) -> Tensor:
    return table.flatten(0, 1)


def _with_batch(table: Tensor, count: int) -> tuple[Tensor, ...]:
    return (table[None],)


DIT_BLOCK, DIT_BLOCK_KEY = r"backbone\.blocks\.(\d+)", r"blocks.\1"
DIT = (
    Rule(r"backbone\.position_table", ("pos_embed",), _without_batch, _with_batch),
    Rule(r"backbone\.indicator\.weight", ("y_embedder.embedding_table.weight",)),
    Rule(r"backbone\.time\.mlp\.(\d)\.(weight|bias)", (r"t_embedder.mlp.\1.\2",)),
    Rule(rf"{DIT_BLOCK}\.attn\.qkv\.(weight|bias)", (rf"{DIT_BLOCK_KEY}.attn.qkv.\2",)),
    Rule(rf"{DIT_BLOCK}\.attn\.out\.(weight|bias)", (rf"{DIT_BLOCK_KEY}.attn.proj.\2",)),
    Rule(rf"{DIT_BLOCK}\.mlp\.up\.(weight|bias)", (rf"{DIT_BLOCK_KEY}.mlp.fc1.\2",)),
    Rule(rf"{DIT_BLOCK}\.mlp\.down\.(weight|bias)", (rf"{DIT_BLOCK_KEY}.mlp.fc2.\2",)),
    Rule(rf"{DIT_BLOCK}\.modulation\.1\.(weight|bias)", (rf"{DIT_BLOCK_KEY}.adaLN_modulation.1.\2",)),
    *_renamed(
        {
            r"backbone\.final_modulation\.1": "final_layer.adaLN_modulation.1",
            r"backbone\.final": "final_layer.linear",
        }
    ),
)
PATCHES = (
    Rule(r"backbone\.embed\.weight", ("x_embedder.proj.weight",), _as_linear, _as_conv),
    Rule(r"backbone\.embed\.bias", ("x_embedder.proj.bias",)),
)
TOKENS = tuple(_renamed({r"backbone\.embed": "x_embedder"}))
TOWER_DROPPED = {
    r"open_clip\.visual\..*": "the frozen image tower of the contrastive loss, which only training uses and loads by "
    "its hub id or folder (tower.source)",
}

KINDS.register("dimr")(
    Kind(_builder(dimr_settings), DIMR + TEXT + IMAGE_HEAD, TOWER_DROPPED, _set_temperature, dimr_settings)
)
KINDS.register("dit")(
    Kind(_builder(dit_settings), DIT + PATCHES + TEXT + IMAGE_HEAD, TOWER_DROPPED, _set_temperature, dit_settings)
)
KINDS.register("flowtok")(Kind(_builder(flowtok_settings), DIT + TOKENS + TEXT + TEXT_HEAD, settings=flowtok_settings))
