"""Released weights learn own pictures by the same command, in 16 GB."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.core.batch import Batch
from crossflow.core.config import FinetuneConfig
from crossflow.core.noise import training_noise
from crossflow.core.settings import build, merge
from crossflow.core.training.memory import rehearse
from crossflow.core.training.trained import adapt
from crossflow.core.weights import shapes_only
from crossflow.engine.finetune import training_settings
from crossflow.engine.sample import load
from crossflow.tasks import load_config, task_class


@pytest.mark.slow
def test_a_released_network_is_fine_tuned_on_cached_features(runs, blind_judge, tmp_path: Path) -> None:
    pictures, run = tmp_path / "mine", tmp_path / "run"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number * 80, 90, 90)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a cyan wall\n")
    settings = ["train.steps=2", "train.batch_size=2", "data.num_val=2", "train.lr=0.1", "train.warmup_steps=0"]
    settings += ["sample.steps=1", "sample.guidance=1"]
    data = ["--data", f"folder:{pictures}@all", "--features", "--rank", "1", "--keep", "0"]
    assert main(["finetune", str(runs("dit")), "--output", str(run), *data, *settings]) == 0
    assert any((tmp_path / "run_features").iterdir())
    assert load_file(run / "model.safetensors").keys() >= {"backbone.blocks.0.attn.qkv.lora_B.default.weight"}
    pipe, base = load(run), load(runs("dit"))
    assert pipe.task.config.data.train == f"cache:{tmp_path}/run_features@all"
    assert any(not torch.equal(*pair) for pair in zip(pipe.model.parameters(), base.model.parameters(), strict=True))
    pipe.adapter_scale = 0
    assert all(torch.equal(*pair) for pair in zip(pipe.model.parameters(), base.model.parameters(), strict=True))


@pytest.mark.slow
def test_an_adapter_of_the_largest_released_model_is_planned_in_16_gb() -> None:
    """One block is rehearsed; each of the other 35 adds its weights and, recomputed, its input alone."""
    config = load_config("t2i_512_t5_dit", ["loss.encoder=none", "backbone.depth=1", "source.depth=1"])
    settings = {"train": training_settings(config, "lora", "base", is_large=True)}
    config = build(type(config), merge(config.model_dump(mode="json"), settings))
    task = task_class(config.task).outline(config)
    whole = task_class(config.task).outline(load_config("t2i_512_t5_dit", ["loss.encoder=none"]))
    with shapes_only():
        objective = task.build_objective(task.build_model())
        num_more = sum(p.numel() for p in whole.build_model().parameters())
        num_more -= sum(p.numel() for p in objective.model.parameters())
        adapt(objective.model, FinetuneConfig(base="base", rank=16))
    batch = Batch(
        features=torch.zeros(2, 77, 4096),
        mask=torch.ones(2, 77, dtype=torch.bool),
        target=torch.zeros(2, *task.latent_shape),
        ids=("a", "b"),
    )
    step = rehearse(config.train, objective, batch, training_noise(0, 0, range(2), task.latent_shape))
    tokens = config.train.batch_size * 32 * 32
    adapters = 4 * 0.02 * (num_more + objective.model.num_parameters()["flow"])  # weight, gradient, averages, EMA
    layers = 10 * config.train.batch_size * 77 * 1024 * 4 * 20  # of the source encoder, which is not recomputed
    assert 4e9 < step.peak + 4 * num_more + 35 * 4 * tokens * 1280 + 4 * adapters + layers < 16e9
