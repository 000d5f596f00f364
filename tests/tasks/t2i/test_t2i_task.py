"""Text-to-image with frozen encoders and autoencoders, made small here: they train, save, load and sample."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.sample import load
from crossflow.networks.text.tokenizer import build_tokenizer

SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """pretrained(kind): the folder of a tiny clip | t5 | llama text encoder, or autoencoder_kl | autoencoder_tiny."""
    import diffusers
    import transformers

    root = tmp_path_factory.mktemp("pretrained")
    tokenizer = build_tokenizer(["a red cube", "a blue sphere"], vocab_size=400, max_length=16)
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def make(kind: str) -> str:
        folder = root / kind
        if folder.exists():
            return str(folder)
        torch.manual_seed(0)
        if kind == "autoencoder_kl":
            diffusers.AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
            ).save_pretrained(folder)
        elif kind == "autoencoder_tiny":
            channels, blocks = (8, 8), (1, 1)
            diffusers.AutoencoderTiny(
                encoder_block_out_channels=channels,
                decoder_block_out_channels=channels,
                num_encoder_blocks=blocks,
                num_decoder_blocks=blocks,
                latent_channels=4,
            ).save_pretrained(folder)
        else:
            network = {
                "clip": lambda: transformers.CLIPTextModel(
                    transformers.CLIPTextConfig(**SIZES, **marks, max_position_embeddings=32)
                ),
                "t5": lambda: transformers.T5EncoderModel(
                    transformers.T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
                ),
                "llama": lambda: transformers.LlamaModel(
                    transformers.LlamaConfig(**SIZES, **marks, max_position_embeddings=64)
                ),
            }[kind]()
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "codec", "more"),
    [
        ("clip", "autoencoder_kl", ["loss.encoder_target=text", "codec.scale=0.23010"]),
        ("t5", "autoencoder_tiny", ["loss.encoder=reconstruction", "loss.encoder_target=text", "text.scale=10"]),
        ("llama", "pixel", ["source.kind=gaussian", "text.template=draw {prompt}"]),
    ],
)
def test_frozen_encoders_and_autoencoders_train_and_sample(
    pretrained, tiny_settings, blind_judge, tmp_path: Path, encoder: str, codec: str, more: list[str]
) -> None:
    run = tmp_path / "run"
    settings = [f"text.encoder={pretrained(encoder)}", "text.max_length=16", f"codec.kind={codec}", *more]
    if codec != "pixel":
        settings += [f"codec.source={pretrained(codec)}", "backbone.patch=2"]
    assert main(["train", "--task", "t2i", "--output", str(run), *tiny_settings("t2i"), *settings]) == 0
    (picture,) = load(run)("a red cube", output_type="np")
    assert picture.shape == (16, 16, 3)


@pytest.mark.slow
def test_a_text_encoder_whose_weights_changed_is_refused(
    pretrained, tiny_settings, blind_judge, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    encoder = tmp_path / "encoder"
    shutil.copytree(pretrained("clip"), encoder)
    settings = [f"text.encoder={encoder}", "text.max_length=16"]
    assert main(["train", "--task", "t2i", "--output", str(run), *tiny_settings("t2i"), *settings]) == 0
    weights = load_file(encoder / "model.safetensors")
    first = next(iter(weights))
    weights[first] = weights[first] + 1
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="SHA-256"):
        load(run)


@pytest.mark.slow
def test_a_run_is_fine_tuned_to_read_through_another_text_encoder(
    pretrained, tiny_run, blind_judge, tmp_path: Path
) -> None:
    """The layer that reads the encoder's features is trained whole, beside the adapters of others."""
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["--data", "scenes", "data.num_train=8", "data.num_val=2", "train.steps=1", "train.batch_size=4"]
    settings = ["text.max_length=16", "finetune.rank=2", *small]
    clip, t5 = (f"text.encoder={pretrained(kind)}" for kind in ("clip", "t5"))
    assert main(["finetune", str(tiny_run("t2i")), "--output", str(first), clip, *settings]) == 0
    # an encoder of the same width: the layer is there, and is trained where it is asked for
    assert (
        main(["finetune", str(first), "--output", str(second), "--train", "source_encoder.*.embed.*", t5, *settings])
        == 0
    )
    for run in (first, second):
        whole = {name for name in load_file(run / "model.safetensors") if ".lora_" not in name}
        assert "source_encoder.trunk.transformer.embed.1.weight" in whole
        assert all(name.startswith("source_encoder.") for name in whole)
        assert load(run)("a red cube", output_type="np")[0].shape == (16, 16, 3)
