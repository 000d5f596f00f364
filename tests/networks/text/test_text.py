"""Text: every string encodes, padding never matters, and a frozen encoder is the one it says it is."""

import json
import logging
import random
import subprocess
import sys

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.core.source import SourceEncoder
from crossflow.networks.text.encoders import (
    TextFeatures,
    TextTransformer,
    TextTrunk,
    build_tokenizer,
    detokenize,
    load_tokenizer,
    tokenize,
)
from crossflow.networks.text.frozen import clean_text

CAPTIONS = [
    "A red cube, left of the blue sphere.",
    "a small green cone is behind the metal cylinder",
    "two shiny spheres (one yellow) in front of a cube!",
    "the cube is red; the sphere isn't.",
]
STRANGE = [
    "",
    "   \n\t ",
    "🦓🦒 emoji \U0001f468‍\U0001f469‍\U0001f467",
    "مرحبا بالعالم",
    "שלום עולם",
    "红色的立方体",
    "<pad> <eos> <0x41> ▁under",
    "nul\x00 and lone \ud800 surrogate",
    "x" * 10_000,
    "a red cube " * 1000,
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS, vocab_size=400, max_length=24)


def test_known_captions_are_one_token_per_word_and_come_back_clean(tokenizer):
    ids, mask = tokenize(tokenizer, CAPTIONS)
    assert ids.shape == mask.shape == (4, 24)
    assert mask.sum(1)[0] == 10 + 1  # eight words, comma, full stop, <eos>
    assert detokenize(tokenizer, ids) == [caption.lower() for caption in CAPTIONS]
    assert not (ids == tokenizer.unk_token_id).any()


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_every_string_encodes_and_decodes(kind, text):
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=300, max_length=64, kind=kind)
    ids, mask = tokenize(tokenizer, [text])
    assert ids.shape == (1, 64)
    assert mask.any()
    assert not (ids == tokenizer.unk_token_id).any()
    assert (ids == tokenizer.eos_token_id).sum() == 1
    expected = " ".join(text.encode("utf-8", "replace").decode().lower().replace("▁", " ").split())
    back = detokenize(tokenizer, ids)[0]
    if len(expected) < 30:
        assert back == expected
    else:
        assert len(back) > 30
        assert expected.startswith(back)


def test_long_texts_are_cut_with_a_note(caplog):
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=400, max_length=8)
    with caplog.at_level(logging.INFO):
        ids, mask = tokenize(tokenizer, ["a red cube " * 1000, "a cube"])
        tokenize(tokenizer, ["a red cube " * 1000])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "1 of 2 texts are longer than 8 tokens" in caplog.text
    assert mask.sum(1).tolist() == [8, 3]
    assert ids[0, -1] == tokenizer.eos_token_id


def test_special_marks_in_a_prompt_are_text(tokenizer):
    ids, _ = tokenize(tokenizer, ["a <eos> <pad>"])
    assert (ids[0] == tokenizer.eos_token_id).sum() == 1
    assert detokenize(tokenizer, ids) == ["a <eos> <pad>"]


def test_save_and_load_give_the_same_tokens(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [*CAPTIONS, *STRANGE]
    ids, mask = tokenize(tokenizer, texts)
    for loaded in (load_tokenizer(tmp_path / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        again, again_mask = tokenize(loaded, texts)
        assert torch.equal(ids, again)
        assert torch.equal(mask, again_mask)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizer_follows_from_the_captions_alone(kind):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    captions = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    script = (
        "import sys, json; from crossflow.networks.text.encoders import build_tokenizer;"
        f"tokenizer = build_tokenizer(json.load(sys.stdin), vocab_size=400, kind={kind!r});"
        "print(json.dumps(tokenizer.get_vocab()))"
    )
    here = build_tokenizer(captions, vocab_size=400, kind=kind).get_vocab()
    there = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(captions), capture_output=True, text=True, check=True
    )
    assert json.loads(there.stdout) == here
    assert len(here) <= 400


def test_auto_takes_pieces_when_words_do_not_fit():
    captions = [f"word{number} again" for number in range(300)]
    few, many = (build_tokenizer(captions, vocab_size=size, max_length=8) for size in (300, 800))
    assert len(tokenize(many, ["word7 again"])[0][0].nonzero()) == 3
    assert detokenize(few, tokenize(few, ["word7 again"])[0]) == ["word7 again"]
    with pytest.raises(UserError, match="no room"):
        build_tokenizer(captions, vocab_size=200)
    with pytest.raises(UserError, match="auto, word and bpe"):
        build_tokenizer(captions, kind="char")


LATENTS = [(3, 16, 16), (4, 8, 16), (1, 32, 32), (12, 16), (5, 3)]


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("head", ["queries", "flatten"])
def test_trunk_gives_both_moments_of_any_latent(latent, head):
    trunk = TextTrunk(latent, vocab_size=50, max_length=9, width=16, depth=1, heads=2, head=head)
    ids, mask = torch.randint(50, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    assert trunk(ids, mask).shape == (3, 2, *latent)
    encoder = SourceEncoder(trunk, "variational", latent)
    assert encoder(ids, mask).sample(generator=torch.Generator().manual_seed(0)).shape == (3, *latent)


@pytest.mark.parametrize("head", ["queries", "flatten"])
@pytest.mark.parametrize("frozen", [False, True])
def test_padding_never_matters(head, frozen):
    inputs = {"feature_width": 6} if frozen else {"vocab_size": 50}
    trunk = TextTrunk((2, 8, 8), max_length=10, width=16, depth=2, heads=2, head=head, **inputs)
    x = torch.randn(2, 10, 6) if frozen else torch.randint(50, (2, 10))
    mask = torch.arange(10) < torch.tensor([[4], [7]])
    out = trunk(x, mask)
    other = x.clone()
    other[~mask] = 33
    torch.testing.assert_close(trunk(other, mask), out)
    torch.testing.assert_close(trunk(x[:, :7], mask[:, :7]), out, atol=1e-5, rtol=1e-4)
    other = x.clone()
    other[0, 3] = 1
    assert not torch.allclose(trunk(other, mask)[0], out[0])


@pytest.mark.parametrize("head", ["queries", "flatten"])
def test_a_row_without_tokens_is_finite_and_trains(head):
    trunk = TextTrunk((2, 4, 4), vocab_size=50, max_length=6, width=16, depth=1, heads=2, head=head)
    mask = torch.tensor([[False] * 6, [True] * 6])
    out = trunk(torch.zeros(2, 6, dtype=torch.int64), mask)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_default_patches_keep_the_number_of_queries_small():
    for latent in [(3, 32, 32), (4, 64, 64), (1, 48, 96)]:
        assert len(TextTrunk(latent, vocab_size=50, width=32).head.queries) <= 64


def test_trunk_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="made for 4 tokens"):
        TextTransformer(vocab_size=9, max_length=4, width=8, heads=2)(
            torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5) > 0
        )
    with pytest.raises(UserError, match="Patches of 3"):
        TextTrunk((3, 8, 8), vocab_size=9, patch=3)
    with pytest.raises(UserError, match="queries and flatten"):
        TextTrunk((3, 8, 8), vocab_size=9, head="mean")


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
def encoder_folder(tokenizer, tmp_path_factory):
    def make(family):
        folder = tmp_path_factory.getbasetemp() / f"encoder_{family}"
        if not folder.exists():
            _tiny_network(family).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("family", ["clip", "clip_whole", "t5", "llama"])
def test_features_are_the_networks_own(family, encoder_folder, tokenizer):
    network = _tiny_network(family).eval()
    encoder = TextFeatures.load(encoder_folder(family), max_length=16, clean=False)
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


def test_feature_options_do_what_they_say(encoder_folder):
    folder = encoder_folder("llama")
    plain = TextFeatures.load(folder, max_length=16)
    features, _ = plain(["a red cube"])
    torch.testing.assert_close(TextFeatures.load(folder, max_length=16, scale=10)(["a red cube"])[0], 10 * features)
    prompted = TextFeatures.load(folder, max_length=16, template="a {prompt}")
    torch.testing.assert_close(prompted(["red cube"])[0], features)
    embeddings = TextFeatures.load(folder, max_length=16, layer=0)(["a red cube"])[0]
    torch.testing.assert_close(
        embeddings[0, 0], plain.network.embed_tokens.weight[plain.tokenizer("a")["input_ids"][0]]
    )
    half = TextFeatures.load(folder, max_length=16, precision="bfloat16")
    assert half(["a red cube"])[0].dtype == torch.float32
    torch.testing.assert_close(half(["a red cube"])[0], features, atol=0.1, rtol=0.1)
    torch.testing.assert_close(
        TextFeatures.load(folder, max_length=16, chunk=1)(CAPTIONS)[0], plain(CAPTIONS)[0], atol=1e-5, rtol=1e-4
    )
    with pytest.raises(UserError, match="no layer 9"):
        TextFeatures.load(folder, layer=9)
    with pytest.raises(UserError, match=r"\{prompt\}"):
        TextFeatures.load(folder, template="a photo")


@pytest.mark.parametrize("text", ["", "a red cube " * 1000], ids=["empty", "long"])
@pytest.mark.parametrize("family", ["clip", "t5", "llama"])
def test_features_of_empty_and_long_prompts_are_finite(family, text, encoder_folder):
    features, mask = TextFeatures.load(encoder_folder(family), max_length=16)([text])
    assert features.isfinite().all()
    assert mask.any()


def test_recorded_settings_give_the_same_encoder_or_an_error(encoder_folder, tokenizer, tmp_path):
    network = _tiny_network("t5")
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextFeatures.load(str(tmp_path), max_length=16, scale=10)
    settings = json.loads(json.dumps(encoder.settings()))
    again = TextFeatures.load(**settings)
    assert torch.equal(again(CAPTIONS)[0], encoder(CAPTIONS)[0])
    assert torch.equal(again(["a cube www.example.org"])[0], again(["a cube"])[0])  # T5 text is cleaned
    with torch.no_grad():
        network.shared.weight[5] += 0.01
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        TextFeatures.load(**settings)


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
        TextFeatures.load(str(tmp_path))


def test_unknown_and_absent_encoders_say_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"'vit'.*clip.*llama.*t5"):
        TextFeatures.load(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HOME"):
        TextFeatures.load("nobody/no-such-encoder")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A Photo of a Cat ", "a photo of a cat"),
        ("see https://example.com/cat now", "see now"),
        ("see https://example.com/cat.html now", "see html now"),  # what is left of it after the address
        ("visit www.foo.de today", "visit www. foo. de today"),
        ("dramatic lighting.concept art, 8k", "dramatic art, 8k"),
        ("a lamp \u2e40 free shipping", "a lamp"),
        ("<b>bold</b> cat &amp; dog", "bold cat dog"),
        ("“curly” — dash", '"curly" - dash'),
        ("red-car-in-the-street-photo.jpg", ""),
        ("red_car_in_the_street", "red car in the street"),
        ("free shipping a lamp 1920x1080", "a lamp"),
        ("hello,world", "hello, world"),
        ("cafe\u0301 table", "café table"),
        ("cat (sitting) [on] mat...", "cat sitting on mat"),
        ("", ""),
    ],
)
def test_cleaning_leaves_the_words(text, cleaned):
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned
