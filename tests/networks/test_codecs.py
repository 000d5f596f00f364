"""Codecs: decoding inverts encoding, scales survive saving, and a network is identified by its weights."""

import json
from types import SimpleNamespace

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec, AutoencoderTinyCodec
from crossflow.networks.codecs.pixel import PixelCodec
from crossflow.networks.codecs.registry import build_codec, load_codec


def pictures(count=5, size=16, channels=3, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    folder = tmp_path_factory.mktemp("kl")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    folder = tmp_path_factory.mktemp("tiny")
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_codec_round_trip_is_exact_to_rounding(factor, channels):
    codec = build_codec("pixel", image_channels=channels, factor=factor, scale=2.5, shift=-0.3)
    x = pictures(channels=channels)
    z = codec.encode(x).sample()
    assert z.shape[1:] == codec.latent_shape(16) == (channels * factor**2, 16 // factor, 16 // factor)
    torch.testing.assert_close(codec.decode(z), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(z.mean(), (x.mean() + 0.3) * 2.5)


def test_fitted_scale_gives_unit_variance_per_image_channel():
    x = pictures(64) * torch.tensor([0.1, 0.5, 1.0])[:, None, None] + torch.tensor([0.3, -0.2, 0.0])[:, None, None]
    codec = PixelCodec(factor=2).fit_scale(x.split(10), per_channel=True)
    z = codec.encode(x).mode()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3)), torch.ones(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(codec.decode(z), x, atol=1e-5, rtol=0)
    assert abs(PixelCodec().fit_scale([x]).encode(x).mode().var().item() - 1) < 1e-3


def test_a_codec_without_a_network_takes_no_source(tmp_path):
    PixelCodec().save(tmp_path)
    with pytest.raises(UserError, match=r"pixel codec in .* has no network"):
        load_codec(tmp_path, source="nowhere")


def test_a_scale_is_fitted_in_float64_on_the_cpu_alone(monkeypatch):
    x, codec = pictures(8), PixelCodec()
    moments = SimpleNamespace(mean=SimpleNamespace(cpu=lambda: x))  # some devices have no float64
    monkeypatch.setattr(codec, "encode_moments", lambda images: moments)
    assert torch.allclose(codec.fit_scale([x]).scale, PixelCodec().fit_scale([x]).scale)


def test_kl_codec_scales_samples_like_diffusers(kl_folder):
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(kl_folder)
    codec = AutoencoderKLCodec.build(source=str(kl_folder), scale=0.2301, shift=0.1)
    x, noise = pictures(), torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        moments = network.encode(x).latent_dist
        expected = (moments.mean + moments.std * noise - 0.1) * 0.2301
        decoded = network.decode(expected / 0.2301 + 0.1).sample
    torch.testing.assert_close(codec.encode(x).sample(noise=noise), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.decode(expected), decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.encode_moments(x).mean, moments.mean, atol=1e-5, rtol=1e-4)
    assert codec.latent_shape((16, 32)) == (4, 8, 16)


def test_a_half_type_computes_in_channels_last_order_what_float32_computes(kl_folder):
    codec, orders = AutoencoderKLCodec.build(source=str(kl_folder)), []

    def note(module, inputs):
        orders.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    codec.network.encoder.register_forward_pre_hook(note)
    codec.network.decoder.register_forward_pre_hook(note)
    x = pictures(2)
    exact = codec.encode_moments(x).mean, codec.decode(codec.encode(x).mean)
    assert not orders[0], "float32 leaves the order as it came"
    with torch.autocast("cpu", torch.bfloat16):
        rounded = codec.encode_moments(x).mean, codec.decode(codec.encode(x).mean)
    assert orders[3:] == [True] * 3
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)


def test_scale_comes_from_the_network_unless_given(kl_folder, tiny_folder):
    assert AutoencoderKLCodec.build(source=str(kl_folder)).scale.unique().tolist() == pytest.approx([0.18215])
    assert AutoencoderTinyCodec.build(source=str(tiny_folder)).scale.unique().tolist() == [1.0]


def test_tiny_codec_is_a_point_and_shrinks_by_its_stages(tiny_folder):
    codec = build_codec("autoencoder_tiny", source=str(tiny_folder))
    posterior = codec.encode(pictures())
    assert posterior.log_var is None
    assert posterior.mean.shape[1:] == codec.latent_shape(16) == (4, 4, 4)
    assert codec.decode(posterior.mean).shape == (5, 3, 16, 16)


def test_chunks_do_not_change_results(kl_folder):
    whole = AutoencoderKLCodec.build(source=str(kl_folder), chunk=8)
    parts = AutoencoderKLCodec.build(source=str(kl_folder), chunk=2)
    z = whole.encode(pictures()).mode()
    torch.testing.assert_close(parts.encode(pictures()).mode(), z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.decode(z), whole.decode(z), atol=1e-5, rtol=1e-4)


def test_networks_stay_frozen_and_in_evaluation_mode(kl_folder):
    codec = AutoencoderKLCodec.build(source=str(kl_folder))
    codec.train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    x = pictures().requires_grad_()
    assert not codec.encode(x).mean.requires_grad
    z = torch.zeros(1, 4, 8, 8, requires_grad=True)
    codec.decode(z).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("kind", ["pixel", "autoencoder_kl", "autoencoder_tiny"])
def test_saved_codec_loads_the_same(kind, embed, kl_folder, tiny_folder, tmp_path):
    sources = {"autoencoder_kl": str(kl_folder), "autoencoder_tiny": str(tiny_folder)}
    options = {"source": sources[kind]} if kind in sources else {"factor": 2}
    codec = build_codec(kind, **options, scale=1.7, shift=0.2)
    codec.save(tmp_path / "codec", embed=embed)
    loaded = load_codec(tmp_path / "codec")
    x = pictures()
    z = codec.encode(x).mode()
    assert torch.equal(loaded.encode(x).mode(), z)
    assert torch.equal(loaded.decode(z), codec.decode(z))
    if kind != "pixel":
        assert (tmp_path / "codec" / "weights").exists() == embed


def test_codec_from_memory_is_embedded(kl_folder, tmp_path):
    from diffusers import AutoencoderKL

    codec = AutoencoderKLCodec(AutoencoderKL.from_pretrained(kl_folder), scale=0.2301)
    codec.save(tmp_path / "first")
    load_codec(tmp_path / "first").save(tmp_path / "second")
    (tmp_path / "first" / "codec.json").unlink()
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(load_codec(tmp_path / "second").decode(z), codec.decode(z))


def test_changed_weights_are_refused(kl_folder, tmp_path):
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(kl_folder)
    network.save_pretrained(tmp_path / "network")
    AutoencoderKLCodec.build(source=str(tmp_path / "network")).save(tmp_path / "codec")
    with torch.no_grad():
        network.decoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    network.save_pretrained(tmp_path / "network")
    with pytest.raises(UserError, match="SHA-256"):
        load_codec(tmp_path / "codec")
    assert load_codec(tmp_path / "codec", source=str(kl_folder)).source == str(kl_folder)


def test_incomplete_weights_are_refused(kl_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(kl_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((kl_folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks 1 weights.*decoder\.conv_in\.weight"):
        build_codec("autoencoder_kl", source=str(tmp_path))


def test_errors_name_the_files_of_an_unavailable_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"config\.json and diffusion_pytorch_model\.safetensors.*HF_HOME"):
        build_codec("autoencoder_kl", source="nobody/no-such-autoencoder")
    with pytest.raises(UserError, match="does not exist"):
        build_codec("autoencoder_kl", source="./no/such/folder")
    with pytest.raises(UserError, match="must hold"):
        build_codec("autoencoder_tiny", source=str(tmp_path))
    with pytest.raises(UserError, match="hub id"):
        build_codec("autoencoder_kl")


def test_invalid_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="pixel"):
        build_codec("pixels")
    with pytest.raises(UserError, match="multiples of 4"):
        PixelCodec(factor=4).latent_shape(18)
    with pytest.raises(UserError, match="one per latent channel"):
        PixelCodec(scale=[1.0, 2.0])
    with pytest.raises(UserError, match="must not be 0"):
        PixelCodec(scale=0.0)
    with pytest.raises(UserError, match="takes 1 channels"):
        PixelCodec(image_channels=1).encode(pictures())
    with pytest.raises(UserError, match="no codec"):
        load_codec(tmp_path)


def test_saved_settings_hold_no_half_written_file(tmp_path):
    PixelCodec(scale=2.0).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["codec.json"]
    assert json.loads((tmp_path / "codec.json").read_text())["scale"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("content", ["", '{"kind": "pixel", "opt', "[]", "{}", '{"kind": "pixel", "options": {}}'])
def test_damaged_settings_are_refused(content, tmp_path):
    (tmp_path / "codec.json").write_text(content)
    with pytest.raises(UserError, match=r"codec\.json is damaged"):
        load_codec(tmp_path)
    with pytest.raises(UserError, match=r"codec\.json is damaged"):
        build_codec("autoencoder_kl", source=str(tmp_path))
