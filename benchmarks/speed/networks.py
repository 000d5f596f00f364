"""Frozen networks with random weights in the place of a recipe's public ones, and a cache of random features.

Speed does not depend on weights, so nothing is downloaded. The networks have the sizes of the public ones: the text
tower of CLIP ViT-L/14 at the recipe's feature width, the autoencoder of Stable Diffusion, FlowTiTok at 512 px, the
image tower of SigLIP ViT-L/16. They are written as folders, which the recipe then names like any others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core.config import Config
from crossflow.core.noise import keyed_generator
from crossflow.core.source import Posterior
from crossflow.data.cache.build import Builder, Settings
from crossflow.data.cache.extract import Extractor, Features, Options
from crossflow.data.item import Item
from crossflow.data.readers import open_reader
from crossflow.tasks import load_config, task_class

WORDS = ("a red cube on the left of a small blue metal sphere", "two green cylinders behind a large yellow cone")
NUM_CACHED = {False: 512, True: 8}
"""Samples of a cache of random features, by whether it is small."""


def offline_config(
    recipe: str, overrides: Sequence[str], folder: Path, *, cached: bool = False, small: bool = False
) -> Config:
    """The configuration of a recipe on data and networks that need no download.

    Recipes with frozen networks get random ones in `folder`; recipes without data of their own train on scenes.

    Args:
        cached: train from a cache of random features, where the recipe has a frozen text encoder.
        small: networks of one layer, for tests.
    """
    config = load_config(recipe, overrides)
    settings = [*overrides, *task_class(config.task).quick]
    chosen = [setting for setting in overrides if setting.startswith("data.train=")]
    if not chosen:
        settings += ["data.train=scenes", "data.num_train=512"]
    settings += _random_networks(load_config(recipe, settings), folder, small)
    config = load_config(recipe, settings)
    if cached and not chosen and frozen_text(config):
        write_random_cache(config, folder / "cache", NUM_CACHED[small])
        settings += [f"data.train=cache:{folder / 'cache'}", "data.val=scenes"]
    return load_config(recipe, settings)


def frozen_text(config: Config) -> bool:
    """Whether the recipe reads the features of a frozen text encoder, which can be cached."""
    text = getattr(config, "text", None)
    return text is not None and text.frozen


def _random_networks(config: Config, folder: Path, small: bool) -> list[str]:
    """Writes the networks that the recipe needs; returns the settings that name them."""
    torch.manual_seed(0)
    text, codec, tower = (getattr(config, name, None) for name in ("text", "codec", "tower"))
    width = text.feature_width if text is not None else None
    settings = []
    if width is not None and text is not None:
        _write_text_encoder(folder / "text", width, text.max_length, small)
        settings.append(f"text.encoder={folder / 'text'}")
    if codec is not None and codec.kind == "autoencoder_kl":
        _write_autoencoder(folder / "codec", small)
        settings.append(f"codec.source={folder / 'codec'}")
    if codec is not None and codec.kind == "flowtitok":
        _write_flowtitok(folder / "codec", config.data.image_size, width or 768, small)
        settings.append(f"codec.source={folder / 'codec'}")
    if tower is not None and tower.frozen and config.loss.encoder in ("contrastive", "sigmoid"):
        _write_image_tower(folder / "tower", tower.width, config.data.image_size, small)
        settings.append(f"tower.source={folder / 'tower'}")
    return settings


def _write_text_encoder(folder: Path, width: int, length: int, small: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from crossflow.networks.text.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(WORDS, vocab_size=400, max_length=length)
    config = CLIPTextConfig(
        vocab_size=400 if small else 49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if small else 12,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=length,
        projection_dim=width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_autoencoder(folder: Path, small: bool) -> None:
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4 if small else (128, 256, 512, 512),
        layers_per_block=1 if small else 2,
        norm_num_groups=4 if small else 32,
        latent_channels=4,
    )
    network.save_pretrained(folder)


def _write_flowtitok(folder: Path, image_size: int, width: int, small: bool) -> None:
    from crossflow.networks.codecs.flowtitok_network import FlowTiTok, FlowTiTokConfig

    sizes = {"encoder": "tiny", "decoder": "tiny"} if small else {}
    FlowTiTok(FlowTiTokConfig(image_size=image_size, text_width=width, **sizes)).save_pretrained(folder)  # type: ignore[arg-type]


def _write_image_tower(folder: Path, width: int | None, image_size: int, small: bool) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    width = width or 1024
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if small else 24,
        num_attention_heads=max(1, width // 64),
        image_size=min(256, image_size),
        patch_size=16,
    )
    network = SiglipVisionModel(config)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(1.01)  # a tower whose norms have their initial values is refused as untrained
    network.save_pretrained(folder)


class RandomFeatures(Extractor):
    """Random numbers of the shapes that the frozen networks' features have; describes itself as these networks do."""

    @classmethod
    def like(cls, extractor: Extractor) -> "RandomFeatures":
        """Features of the shapes that `extractor` computes."""
        result = cls.__new__(cls)
        result.__dict__.update(extractor.__dict__)
        return result

    def __call__(self, items: Sequence[Item]) -> list[Any]:
        """Random features of items, which depend on their ids alone."""
        return [self._features(item) for item in items]

    def _features(self, item: Item) -> Features:
        generator = keyed_generator("random features", item.id)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        fixed: dict[str, Tensor] = {}
        text: list[Tensor] = []
        pooled: list[Tensor] = []
        for name, about in self.describe()["parts"].items():
            if name.startswith("moments"):
                raw = Posterior(normal(1, *about["shape"]), normal(1, *about["shape"]) - 4 if about["spread"] else None)
                fixed |= {key: value[0] for key, value in self.moments(raw, int(name.partition("_")[2])).items()}
            elif name == "text":
                text = [self.stored(normal(self.num_tokens([words]), about["width"])) for words in item.captions]
                pooled = [self.stored(normal(about["width"])) for _ in item.captions] if about["pooled"] else []
            else:
                fixed[name] = self.stored(normal(*about["shape"]))
        lengths = self.text.tokens(item.captions)[1].sum(1).tolist() if text and self.text is not None else []
        return Features(fixed, text, lengths, pooled)


def write_random_cache(config: Config, folder: Path, count: int) -> None:
    """Writes a training cache of random features for `count` scenes, as `crossflow cache` would from its networks."""
    reader = open_reader("scenes", "train", image_size=16, limit=count)
    extractor = task_class(config.task).frozen(config).extractor(Options((config.data.image_size,)))
    Builder(folder, {"train": reader}, RandomFeatures.like(extractor), Settings()).run()
