"""FlowTiTok: rotary positions are relative, text guides the decoder, and only pictures of its size are accepted."""

from dataclasses import replace

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.flowtitok_network import FlowTiTok, FlowTiTokConfig, rotary_tables, rotate
from crossflow.networks.codecs.registry import build_codec, load_codec

TINY = FlowTiTokConfig(image_size=32, encoder="tiny", decoder="tiny", num_tokens=5, channels=4, text_width=12)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return FlowTiTokCodec(FlowTiTok(TINY), scale=1.0143)


def test_latents_are_tokens(codec):
    posterior = codec.encode(torch.rand(3, 3, 32, 32) * 2 - 1)
    assert posterior.mean.shape == posterior.log_var.shape == (3, *codec.latent_shape(32)) == (3, 5, 4)
    assert codec.decode(posterior.mean, torch.randn(3, 5, 12)).shape == (3, 3, 32, 32)


def test_scales_of_tokens_are_measured_and_kept_per_channel(codec):
    images = torch.rand(40, 3, 32, 32) * 2 - 1
    fitted = FlowTiTokCodec(codec.network).fit_scale(images.split(16), per_channel=True)
    z = fitted.encode(images).mean
    torch.testing.assert_close(z.mean((0, 1)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var((0, 1)), torch.ones(4), atol=1e-2, rtol=0)


def test_chunks_do_not_change_results(codec):
    parts = FlowTiTokCodec(codec.network, scale=1.0143, chunk=2)
    x, text = torch.rand(5, 3, 32, 32) * 2 - 1, torch.randn(5, 5, 12)
    z = codec.encode(x).mean
    torch.testing.assert_close(parts.encode(x).mean, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.decode(z, text), codec.decode(z, text), atol=1e-5, rtol=1e-4)


def test_text_guides_the_decoder_and_is_required(codec):
    z, text = torch.randn(1, 5, 4), torch.randn(2, 5, 12)
    first, second = codec.decode(z, text[:1]), codec.decode(z, text[1:])
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(UserError, match="with text features, got none"):
        codec.decode(z)
    with pytest.raises(UserError, match="5 x 12"):
        codec.decode(z, torch.randn(1, 5, 13))
    with pytest.raises(UserError, match="pixel codec decodes without text features"):
        build_codec("pixel").decode(torch.zeros(1, 3, 4, 4), text[:1])


def test_pixel_range_of_the_network_is_converted(codec):
    network = FlowTiTok(replace(TINY, pixels="unit"))
    network.load_state_dict(codec.network.state_dict())
    unit = FlowTiTokCodec(network, scale=1.0143)
    x, text, z = torch.rand(2, 3, 32, 32), torch.randn(2, 5, 12), torch.randn(2, 5, 4)
    torch.testing.assert_close(unit.encode(2 * x - 1).mean, codec.encode(x).mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unit.decode(z, text), 2 * codec.decode(z, text) - 1)
    with pytest.raises(UserError, match="signed"):
        replace(TINY, pixels="bytes")


def test_rotated_products_depend_on_the_distance_alone():
    cos, sin = rotary_tables(4, 8)
    assert cos.shape == sin.shape == (16, 8)
    q, k = torch.randn(2, 1, 1, 1, 8)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 16, 8), cos, sin).reshape(4, 4, 8) for x in (q, k))
    products = torch.einsum("ijd,kld->ijkl", rotated_q, rotated_k)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[3, 2, 1, 2], products[2, 0, 0, 0])
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3


def test_only_patches_are_rotated():
    cos, sin = rotary_tables(2, 8)
    x = torch.randn(1, 2, 7, 8)
    rotated = rotate(x, cos, sin)
    assert torch.equal(rotated[:, :, 4:], x[:, :, 4:])
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_a_saved_codec_is_loaded_by_its_folder(codec, tmp_path):
    codec.save(tmp_path / "tokenizer")
    codec_of_run = build_codec("flowtitok", source=str(tmp_path / "tokenizer"))
    assert codec_of_run.scale.tolist() == pytest.approx([1.0143] * 4)
    codec_of_run.save(tmp_path / "run")
    assert not (tmp_path / "run" / "weights").exists()
    z, text = torch.randn(1, 5, 4), torch.randn(1, 5, 12)
    assert torch.equal(load_codec(tmp_path / "run").decode(z, text), codec.decode(z, text))
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(UserError):
        load_codec(tmp_path / "run")
    moved = load_codec(tmp_path / "run", source=str(tmp_path / "moved"))
    assert torch.equal(moved.decode(z, text), codec.decode(z, text))


def test_other_weights_than_recorded_are_refused(codec, tmp_path):
    codec.save(tmp_path / "first")
    build_codec("flowtitok", source=str(tmp_path / "first")).save(tmp_path / "run")
    FlowTiTokCodec(FlowTiTok(TINY)).save(tmp_path / "other")
    with pytest.raises(UserError, match="SHA-256"):
        load_codec(tmp_path / "run", source=str(tmp_path / "other"))


def test_other_sizes_are_refused(codec):
    with pytest.raises(UserError, match=r"data\.image_size=32"):
        codec.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="multiple of patch = 16"):
        FlowTiTokConfig(image_size=40)


def test_damaged_folders_are_refused(codec, tmp_path):
    with pytest.raises(UserError, match="no FlowTiTok"):
        build_codec("flowtitok", source=str(tmp_path))
    codec.network.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        build_codec("flowtitok", source=str(tmp_path))
    build_codec("pixel").save(tmp_path / "pixels")
    with pytest.raises(UserError, match="got a pixel codec"):
        build_codec("flowtitok", source=str(tmp_path / "pixels"))
