"""Fixtures: `recipe`, weights and inputs by name; `recorded`, the reference networks' outputs (tests/golden); `files`,
`encoders` and `runs`, small released files, text encoders of their widths, and the converted runs.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.released import expected
from crossflow.released.convert import from_file

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = {"num_blocks": 1, "hidden_dim": 32, "hidden_token_length": 256, "num_attention_heads": 8, "dropout_prob": 0.1}
STAGE = {"image_input_ratio": 1, "final_kernel_size": 3, "dropout_prob": 0}
CROSSFLOW = {"channels": 4, "num_clip_token": 77, "cfg_indicator": 0.1, "textVAE": TEXT}
DIMR = {
    **CROSSFLOW,
    "clip_dim": 768,
    "stage_configs": [
        {"block_type": "TransformerBlock", "dim": 16, "hidden_dim": 32, "num_attention_heads": 2, "num_blocks": 3}
        | {"max_height": 4, "max_width": 4, "input_feature_ratio": 2}
        | STAGE,
        {"block_type": "ConvNeXtBlock", "dim": 8, "hidden_dim": 16, "kernel_size": 7, "num_blocks": 3}
        | {"max_height": 8, "max_width": 8, "input_feature_ratio": 1}
        | STAGE,
    ],
}
DIT = {**CROSSFLOW, "clip_dim": 4096, "latent_size": 8, "learn_sigma": False, "patch_size": 2}
DIT |= {"hidden_size": 32, "depth": 2, "num_heads": 4}
FLOWTOK = {
    "learn_sigma": False,
    "channels": 16,
    "clip_dim": 768,
    "num_clip_token": 77,
    "use_t2t_temperature": True,
    "cfg_indicator": 0.1,
    "textVAE": TEXT,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
}
TITOK = {
    "vq_model": {
        "token_size": 16,
        "vit_enc_model_size": "tiny",
        "vit_dec_model_size": "tiny",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 77,
    },
    "dataset": {"crop_size": 64},
}
VAE = {
    "scale_factor": 0.2301,
    "ddconfig": {
        "z_channels": 4,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
    },
}
CONFIGS = {"dimr": DIMR, "dit": DIT, "flowtok": FLOWTOK, "flowtitok": TITOK, "autoencoder_kl": VAE}


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crossflow_tests_recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], dict[str, Tensor]]:
    """recorded(NAME): the tensors of tests/golden/NAME.safetensors."""
    from safetensors.torch import load_file

    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def configs():
    """Settings of small networks by kind, as the reference has them."""
    return CONFIGS


@pytest.fixture(scope="session")
def files(recipe, tmp_path_factory):
    """files(kind): (released file of a small network by recipe, its settings' file, its tensors)."""
    root, ready = tmp_path_factory.mktemp("files"), {}

    def make(kind):
        if kind not in ready:
            shapes = expected(kind, CONFIGS[kind], ())
            state = recipe.weights({key: shape for key, shape in shapes.items() if "freqs_" not in key})
            path, config = root / f"{kind}.pth", root / f"{kind}.json"
            torch.save(state, path)
            config.write_text(json.dumps({"kind": kind, "config": CONFIGS[kind]}))
            ready[kind] = path, config, state
        return ready[kind]

    return make


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """encoders(name): the folder of a tiny clip | t5 text encoder of the released widths, with its tokenizer."""
    import transformers

    root = tmp_path_factory.mktemp("encoders")

    def make(name):
        folder = root / name
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if name == "clip":
            sizes = {"hidden_size": 768, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 12}
            marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
            network = transformers.CLIPTextModel(
                transformers.CLIPTextConfig(vocab_size=400, max_position_embeddings=77, **sizes, **marks)
            )
        else:
            network = transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=400, d_model=4096, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            )
        network.save_pretrained(folder)
        build_tokenizer(["a red cube", "a blue sphere"], vocab_size=400, max_length=77).save_pretrained(folder)
        if name == "clip":
            settings = folder / "tokenizer_config.json"
            settings.write_text(settings.read_text().replace("<pad>", "<eos>"))  # CLIP's own pads with its end token
        return folder

    return make


@pytest.fixture(scope="session")
def runs(files, encoders, tmp_path_factory):
    """runs(kind): a converted run with its text encoder and codec, made once; not to be written to."""
    root, ready = tmp_path_factory.mktemp("runs"), {}

    def make(kind):
        if kind not in ready:
            path, config, _ = files(kind)
            encoder, codec = {
                "dimr": ("clip", "autoencoder_kl"),
                "dit": ("t5", "autoencoder_kl"),
                "flowtok": ("clip", "flowtitok"),
            }[kind]
            if codec not in ready:
                ready[codec] = from_file(files(codec)[0], root / codec, config=files(codec)[1]).path
            overrides = [f"text.encoder={encoders(encoder)}", f"codec.source={ready[codec]}"]
            overrides += ["data.image_size=64"] if kind == "flowtok" else []
            ready[kind] = from_file(path, root / kind, config=config, overrides=overrides).path
        return ready[kind]

    return make
