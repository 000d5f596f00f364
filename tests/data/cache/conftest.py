"""Tiny frozen networks, a folder of pictures with captions, and settings of a recipe that reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.networks.text.tokenizer import build_tokenizer

WORDS = ("a red cube", "a small blue sphere on a plane", "two green cones", "a cube left of a large yellow cylinder")
LENGTH = 16


@pytest.fixture(scope="session")
def frozen(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny CLIP text encoder (text), an autoencoder (codec), an image tower (tower), and each with other
    weights (other_...).
    """
    import diffusers
    import transformers

    root = tmp_path_factory.mktemp("frozen")
    tokenizer = build_tokenizer(WORDS, vocab_size=400, max_length=LENGTH)
    for number, prefix in enumerate(("", "other_")):
        torch.manual_seed(number)
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ).save_pretrained(root / f"{prefix}codec")
        config = transformers.CLIPTextConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            max_position_embeddings=32,
        )
        transformers.CLIPTextModel(config).save_pretrained(root / f"{prefix}text")
        tokenizer.save_pretrained(root / f"{prefix}text")
        vision = transformers.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        transformers.SiglipVisionModel(vision).save_pretrained(root / f"{prefix}tower")
    names = ("text", "codec", "tower")
    return {name: str(root / name) for name in (*names, *(f"other_{name}" for name in names))}


@pytest.fixture(scope="session")
def recipe(frozen, tiny_settings):
    """recipe(...): overrides of t2i_tiny that read the frozen networks, and more."""

    def overrides(*more: str, text: str = "text", codec: str = "codec") -> list[str]:
        settings = [
            *(setting for setting in tiny_settings("t2i") if not setting.startswith("data.num_train")),
            f"text.encoder={frozen[text]}",
            f"text.max_length={LENGTH}",
            "codec.kind=autoencoder_kl",
            f"codec.source={frozen[codec]}",
            "codec.scale=0.5",
            "loss.encoder_target=text",
        ]
        overridden = {setting.partition("=")[0] for setting in more}
        return [*(setting for setting in settings if setting.partition("=")[0] not in overridden), *more]

    return overrides


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures with one or two captions in train/, four in val/."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number:02d}.png")
            captions = [WORDS[number % 4], WORDS[(number + 1) % 4]][: 1 + number % 2]
            (root / split / f"{number:02d}.txt").write_text("\n".join(captions), encoding="utf-8")
    return root
