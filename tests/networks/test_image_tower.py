"""The frozen image tower: identified by its checksum, complete, trained, and independent of the picture's size."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from crossflow.core.errors import UserError
from crossflow.networks.image_tower import ImageTower, TowerSettings, _untrained

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GRID = {"image_size": 16, "patch_size": 8}


def perturb(folder):
    """Changes every weight a little, as training does."""
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def tower(tmp_path):
    """tower(kind, trained=True): the folder of a tiny siglip | clip | timm network."""

    def make(kind, trained=True):
        torch.manual_seed(0)
        folder = tmp_path / kind
        if kind == "timm":
            import timm

            sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 0}
            network = timm.create_model("vit_tiny_patch16_224", **sizes)
            folder.mkdir()
            save_file(network.state_dict(), folder / "model.safetensors")
            statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 16, 16], "num_classes": 0}
            config = {"architecture": "vit_tiny_patch16_224", "num_features": 16, "pretrained_cfg": statistics}
            (folder / "config.json").write_text(json.dumps({**config, "model_args": sizes}))
        else:
            import transformers

            network = {
                "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **GRID)),
                "clip": lambda: transformers.CLIPVisionModelWithProjection(
                    transformers.CLIPVisionConfig(**SIZES, **GRID, projection_dim=12)
                ),
            }[kind]()
            network.save_pretrained(folder)
        if trained:
            perturb(folder)
        return folder

    return make


def pictures(size=16):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("kind", "width"), [("siglip", 16), ("clip", 12), ("timm", 16)])
def test_towers_embed_pictures_of_any_size(tower, caplog, kind, width):
    with caplog.at_level(logging.INFO):
        network = ImageTower.load(TowerSettings(source=str(tower(kind)), width=width))
    assert network.checksum in caplog.text
    embedding = network(pictures())
    assert embedding.shape == (3, width)
    assert not embedding.requires_grad
    assert network(pictures(40)).shape == (3, width)
    assert not torch.allclose(embedding[0], embedding[1])
    assert not network.train().training


def test_siglip_gives_the_pooled_output(tower):
    import transformers

    folder = tower("siglip")
    right = transformers.SiglipVisionModel.from_pretrained(folder)(pixel_values=pictures()).pooler_output
    torch.testing.assert_close(ImageTower.load(TowerSettings(source=str(folder)))(pictures()), right)


@pytest.mark.parametrize("kind", ["siglip", "timm"])
def test_an_untrained_tower_is_refused_unless_allowed(tower, kind):
    folder = str(tower(kind, trained=False))
    with pytest.raises(UserError, match="was never trained"):
        ImageTower.load(TowerSettings(source=folder))
    assert ImageTower.load(TowerSettings(source=folder, allow_random=True))(pictures()).shape == (3, 16)


def test_an_untrained_convolutional_tower_is_recognised_by_its_statistics():
    tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(tower[3].weight)  # as residual networks are initialised
    assert _untrained(tower.eval())
    tower.train()(pictures())
    assert not _untrained(tower)
    assert _untrained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))


def test_a_tower_without_weights_is_refused_unless_allowed(tower):
    folder = tower("siglip")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        ImageTower.load(TowerSettings(source=str(folder)))
    assert ImageTower.load(TowerSettings(source=str(folder), allow_random=True))(pictures()).shape == (3, 16)


def test_a_tower_that_lacks_some_weights_is_refused(tower):
    folder = tower("siglip")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if "q_proj.weight" in key))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        ImageTower.load(TowerSettings(source=str(folder)))


def test_another_tower_than_the_recorded_one_is_refused(tower):
    folder = tower("siglip")
    settings = TowerSettings(source=str(folder))
    recorded = ImageTower.load(settings).checksum
    assert ImageTower.load(settings, recorded).checksum == recorded
    perturb(folder)
    with pytest.raises(UserError, match="SHA-256"):
        ImageTower.load(settings, recorded)


def test_invalid_towers_are_refused(tower, tmp_path):
    with pytest.raises(UserError, match=r"set tower\.source"):
        ImageTower.load(TowerSettings(width=16))
    with pytest.raises(UserError, match=r"tower\.width = 24"):
        ImageTower.load(TowerSettings(source=str(tower("siglip")), width=24))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert network"):
        ImageTower.load(TowerSettings(source=str(tmp_path / "bert")))
