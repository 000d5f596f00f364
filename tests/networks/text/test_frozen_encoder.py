"""Frozen text encoders: the features are the network's own, and a recorded encoder is recognised by its weights."""

import json

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.text.frozen_encoder import FrozenTextEncoder, TextEncoderSettings
from crossflow.networks.text.tokenizer import build_tokenizer, tokenize

CAPTIONS = [
    "A red cube, left of the blue sphere.",
    "a small green cone is behind the metal cylinder",
    "two shiny spheres (one yellow) in front of a cube!",
    "the cube is red; the sphere isn't.",
]


def _tiny_network(family):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if family == "clip":
        config = transformers.CLIPTextConfig(
            **sizes, max_position_embeddings=32, eos_token_id=2, bos_token_id=1, pad_token_id=0
        )
        return transformers.CLIPTextModel(config)
    if family == "clip_whole":
        text = transformers.CLIPTextConfig(
            **sizes, max_position_embeddings=32, eos_token_id=2, bos_token_id=1, pad_token_id=0
        )
        image = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        )
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=8)
        )
    if family == "t5":
        config = transformers.T5Config(
            vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2
        )
        return transformers.T5ForConditionalGeneration(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS, vocab_size=400, max_length=24)


@pytest.fixture(scope="module")
def encoder_folder(tokenizer, tmp_path_factory):
    """encoder_folder(family): the folder of a tiny text encoder with its tokenizer."""
    root = tmp_path_factory.mktemp("encoders")

    def make(family):
        folder = root / family
        if not folder.exists():
            _tiny_network(family).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def load(source, **settings):
    return FrozenTextEncoder.load(TextEncoderSettings(str(source), **settings))


@pytest.mark.parametrize("family", ["clip", "clip_whole", "t5", "llama"])
def test_features_are_the_hidden_states_of_the_network(family, encoder_folder, tokenizer):
    network = _tiny_network(family).eval()
    encoder = load(encoder_folder(family), max_length=16, clean=False)
    assert encoder.family == {"clip_whole": "clip", "llama": "decoder"}.get(family, family)
    features, mask = encoder(CAPTIONS)
    assert features.shape == (4, 16, encoder.width)
    assert features.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert encoder.pooled(CAPTIONS).shape == (4, encoder.width)
    ids, expected_mask = tokenize(tokenizer, CAPTIONS, 16)
    assert torch.equal(mask, expected_mask)
    with torch.no_grad():
        if family == "clip":
            expected = network(ids).last_hidden_state
        elif family == "clip_whole":
            expected = network.text_model(ids).last_hidden_state
        elif family == "t5":
            expected = network.encoder(ids, attention_mask=mask.long()).last_hidden_state
        else:
            expected = network.model(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(features[mask], expected[mask], atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.train().parameters())
    assert not any(module.training for module in encoder.modules())


def test_settings_change_the_features_as_documented(encoder_folder):
    folder = encoder_folder("llama")
    plain = load(folder, max_length=16)
    features, _ = plain(["a red cube"])
    torch.testing.assert_close(load(folder, max_length=16, scale=10)(["a red cube"])[0], 10 * features)
    prompted = load(folder, max_length=16, template="a {prompt}")
    torch.testing.assert_close(prompted(["red cube"])[0], features)
    embeddings = load(folder, max_length=16, layer=0)(["a red cube"])[0]
    torch.testing.assert_close(
        embeddings[0, 0], plain.network.embed_tokens.weight[plain.tokenizer("a")["input_ids"][0]]
    )
    half = load(folder, max_length=16, precision="bfloat16")
    assert half(["a red cube"])[0].dtype == torch.float32
    torch.testing.assert_close(half(["a red cube"])[0], features, atol=0.1, rtol=0.1)
    torch.testing.assert_close(
        load(folder, max_length=16, chunk=1)(CAPTIONS)[0],
        plain(CAPTIONS)[0],
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(UserError, match="got layer 9"):
        load(folder, layer=9)
    with pytest.raises(UserError, match=r"\{prompt\}"):
        load(folder, template="a photo")


@pytest.mark.parametrize("text", ["", "a red cube " * 1000], ids=["empty", "long"])
@pytest.mark.parametrize("family", ["clip", "t5", "llama"])
def test_features_of_empty_and_long_prompts_are_finite(family, text, encoder_folder):
    features, mask = load(encoder_folder(family), max_length=16)([text])
    assert features.isfinite().all()
    assert mask.any()


def test_recorded_settings_give_the_same_encoder_or_an_error(encoder_folder, tokenizer, tmp_path):
    network = _tiny_network("t5")
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load(tmp_path, max_length=16, scale=10)
    record = json.loads(json.dumps(encoder.record()))
    again = FrozenTextEncoder.from_record(record)
    assert torch.equal(again(CAPTIONS)[0], encoder(CAPTIONS)[0])
    assert torch.equal(again(["a cube www.example.org"])[0], again(["a cube"])[0])  # T5 text is cleaned
    with torch.no_grad():
        network.shared.weight[5] += 0.01
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        FrozenTextEncoder.from_record(record)


def test_an_encoder_with_missing_weights_is_refused(encoder_folder, tokenizer, tmp_path):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    weights = load_file(Path(encoder_folder("clip")) / "model.safetensors")
    gone = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((Path(encoder_folder("clip")) / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 1 weights.*final_layer_norm\.weight"):
        load(tmp_path)


def test_unknown_and_unavailable_encoders_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"'vit'.*clip.*llama.*t5"):
        load(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HOME"):
        load("nobody/no-such-encoder")
