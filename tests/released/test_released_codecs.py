"""The released codecs: equal to the reference networks, complete or refused, and converted back bit for bit."""

import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.registry import load_codec
from crossflow.released import expected, from_reference, to_reference

FLOWTITOK = {
    "vq_model": {
        "deterministic": False,
        "token_size": 16,
        "vit_enc_model_size": "small",
        "vit_dec_model_size": "small",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 77,
        "is_legacy": False,
        "use_rmsnorm": False,
        "use_swiglu": True,
        "scale_factor": 1.0143,
    },
    "dataset": {"crop_size": 256},
}
SD_VAE = {
    "scale_factor": 0.2301,
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
}
CONFIGS = {"flowtitok": FLOWTITOK, "autoencoder_kl": SD_VAE}
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def small(kind):
    """A config of the kind for a small network."""
    if kind == "autoencoder_kl":
        return {"ddconfig": {**SD_VAE["ddconfig"], "ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}}
    model = {**FLOWTITOK["vq_model"], "vit_enc_model_size": "tiny", "vit_dec_model_size": "tiny"}
    return {"vq_model": model, "dataset": {"crop_size": 32}}


def file_of(recipe, kind, config=None):
    """The tensors of a released file by recipe, without the computed rotary tables."""
    shapes = expected(kind, config or small(kind), ())
    return recipe.weights({key: shape for key, shape in shapes.items() if "freqs_" not in key})


@pytest.fixture(scope="module")
def flowtitok(recipe):
    return from_reference("flowtitok", file_of(recipe, "flowtitok", FLOWTITOK), FLOWTITOK)


@pytest.mark.slow
def test_flowtitok_equals_the_reference(recipe, recorded, flowtitok):
    right = recorded("released_codecs")
    posterior = flowtitok.encode(recipe.tensor_of("flowtitok_small/image", (1, 3, 256, 256)).clamp(-1, 1))
    assert posterior.mean.shape == (1, *flowtitok.latent_shape(256)) == (1, 77, 16)
    torch.testing.assert_close(posterior.mean, right["flowtitok.mean"], **TOLERANCE)
    torch.testing.assert_close(posterior.log_var, right["flowtitok.log_var"], **TOLERANCE)
    tokens = recipe.tensor_of("flowtitok_small/tokens", (1, 16, 1, 77))[:, :, 0].transpose(1, 2)
    decoded = flowtitok.decode(tokens, recipe.tensor_of("flowtitok_small/text", (1, 77, 768)))
    torch.testing.assert_close(decoded[:, :, 3::8, 5::8], right["flowtitok.decoded_every_8th"], **TOLERANCE)


@pytest.mark.slow
def test_flowtitok_is_loaded_without_a_scale(flowtitok):
    assert flowtitok.scale.tolist() == [1.0] * 16
    image = torch.zeros(1, 3, 256, 256)
    raw = flowtitok.encode(image)
    scaled = FlowTiTokCodec(flowtitok.network, scale=1.0143)
    torch.testing.assert_close(scaled.encode(image).mean, raw.mean * 1.0143)
    text = torch.zeros(1, 77, 768)
    torch.testing.assert_close(scaled.decode(raw.mean * 1.0143, text), flowtitok.decode(raw.mean, text), **TOLERANCE)


@pytest.mark.slow
def test_stable_diffusions_autoencoder_equals_the_reference(recipe, recorded):
    right = recorded("released_codecs")
    codec = from_reference("autoencoder_kl", file_of(recipe, "autoencoder_kl", SD_VAE), SD_VAE)
    assert isinstance(codec, AutoencoderKLCodec)
    moments = codec.encode_moments(recipe.tensor_of("sd_vae/image", (1, 3, 64, 64)).clamp(-1, 1))
    both = torch.cat([moments.mean, moments.log_var], dim=1)
    torch.testing.assert_close(both, right["sd_vae.moments"], **TOLERANCE)
    torch.testing.assert_close(codec.scaled(moments).mean, moments.mean * 0.2301)
    decoded = codec.decode(recipe.tensor_of("sd_vae/z", (1, 4, 8, 8)))
    torch.testing.assert_close(decoded, right["sd_vae.decoded"], **TOLERANCE)


def test_incomplete_settings_are_refused(recipe):
    state, config = file_of(recipe, "autoencoder_kl"), small("autoencoder_kl")
    assert from_reference("autoencoder_kl", state, config["ddconfig"]).channels == 4  # its section alone is enough
    without = {name: value for name, value in config["ddconfig"].items() if name != "ch_mult"}
    with pytest.raises(UserError, match="lacks ch_mult"):
        from_reference("autoencoder_kl", state, {"ddconfig": without})
    with pytest.raises(UserError, match="lacks vq_model"):
        from_reference("flowtitok", {}, {})
    with pytest.raises(UserError, match="lacks dataset"):
        from_reference("flowtitok", {}, {"vq_model": FLOWTITOK["vq_model"]})


def test_autoencoder_has_the_scale_of_crossflow_by_default(recipe):
    codec = from_reference("autoencoder_kl", file_of(recipe, "autoencoder_kl"), small("autoencoder_kl"))
    assert codec.scale.flatten().tolist() == pytest.approx([0.2301] * 4)


@pytest.mark.parametrize("kind", ["flowtitok", "autoencoder_kl"])
def test_converting_back_is_exact(recipe, kind):
    state = file_of(recipe, kind)
    back = to_reference(from_reference(kind, state, small(kind)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_rotary_tables_are_computed_instead_of_read(recipe, caplog):
    config = small("flowtitok")
    shapes = expected("flowtitok", config, ())
    state = recipe.weights(shapes)
    with caplog.at_level(logging.WARNING):
        codec = from_reference("flowtitok", state, config)
    assert "rotary tables" in caplog.text
    back = to_reference(codec)
    sine = math.sin(1 * 10000 ** (-2 * 3 / 32))  # channels 6 and 7 of a row's half, channels 38 and 39 of a column's
    table = back["decoder.positional_embedding.freqs_sin"]  # of the grid 2 x 2
    for channel in (6, 7):
        assert table[:, channel].tolist() == pytest.approx([0, 0, sine, sine])
    for channel in (38, 39):
        assert table[:, channel].tolist() == pytest.approx([0, sine, 0, sine])
    again = from_reference("flowtitok", back, config)
    tokens, text = torch.randn(1, 77, 16), torch.randn(1, 77, 768)
    assert torch.equal(again.decode(tokens, text), codec.decode(tokens, text))


@pytest.mark.parametrize("kind", ["flowtitok", "autoencoder_kl"])
def test_missing_mismatched_and_unknown_keys_are_listed(recipe, kind):
    state = file_of(recipe, kind)
    first, second = list(state)[:2]
    del state[first]
    state[second] = torch.zeros(3, 1)
    state["something.else"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        from_reference(kind, state, small(kind))
    assert f"1 missing: {first}" in str(error.value)
    assert f"{second} is (3, 1), not" in str(error.value)
    assert "1 unknown: something.else" in str(error.value)


@pytest.mark.parametrize("kind", ["flowtitok", "autoencoder_kl"])
def test_a_loaded_codec_is_saved_with_its_weights(recipe, kind, tmp_path):
    codec = from_reference(kind, file_of(recipe, kind), small(kind))
    codec.save(tmp_path / "codec")
    loaded = load_codec(tmp_path / "codec")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = codec.encode(x).mean
    assert torch.equal(loaded.encode(x).mean, z)
    text = [torch.randn(2, 77, 768)] if codec.reads_text else []
    assert torch.equal(loaded.decode(z, *text), codec.decode(z, *text))


def test_variants_that_were_not_released_are_refused(recipe):
    config = small("flowtitok")
    with pytest.raises(UserError, match="use_rmsnorm = True"):
        from_reference("flowtitok", {}, {**config, "vq_model": {**config["vq_model"], "use_rmsnorm": True}})
    with pytest.raises(UserError, match="huge"):
        from_reference("flowtitok", {}, {**config, "vq_model": {**config["vq_model"], "vit_enc_model_size": "huge"}})
    with pytest.raises(UserError, match="attn_resolutions"):
        from_reference("autoencoder_kl", {}, {"ddconfig": {**SD_VAE["ddconfig"], "attn_resolutions": [32]}})


@pytest.mark.skipif("CROSSFLOW_TEST_DATA" not in os.environ, reason="needs the key list of the released file")
def test_the_released_tokenizers_keys_are_all_used():
    released = json.loads(
        (Path(os.environ["CROSSFLOW_TEST_DATA"]) / "golden/checkpoints/FlowTiTok_512.json").read_text()
    )
    state = {key: torch.empty(shape, device="meta") for key, shape in released["shapes"].items()}
    codec = from_reference("flowtitok", state, released["config"])
    assert codec.latent_shape(512) == (77, 16)
    assert codec.reference.dropped == {}
    assert {key: list(tensor.shape) for key, tensor in to_reference(codec).items()} == released["shapes"]
