"""Runs with a disease: trained to have it, or a healthy run of which a file is changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.settings import dump
from crossflow.engine.health.evidence import gather
from crossflow.engine.health.reference import Reference, measure_reference
from crossflow.engine.train import train
from crossflow.tasks import load_config

SMALL = [
    *("data.image_size=16", "data.num_train=128", "data.num_val=24"),
    *("source.width=32", "source.depth=1", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
    *("train.steps=60", "train.batch_size=16", "train.precision=no", "train.lr=5e-3", "train.warmup_steps=5"),
    *("train.log_every=5", "train.eval_every=30", "train.save_every=30", "train.sample_every=0", "train.ema=0.9"),
]
"""A run of one to two seconds that learns its task."""


@pytest.fixture
def small() -> list[str]:
    """Settings of a run of one to two seconds."""
    return SMALL


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained(*overrides, recipe="depth_tiny"): the folder of a run with these settings. Not to be written to."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str, recipe: str = "depth_tiny") -> Path:
        key = (recipe, *overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run") / "run"
            train(load_config(recipe, [*SMALL, *overrides]), folders[key])
        return folders[key]

    return run


@pytest.fixture(scope="session")
def healthy(trained: Callable[..., Path]) -> Path:
    """A run with nothing wrong."""
    return trained()


@pytest.fixture(scope="session")
def reference(healthy: Path) -> Reference:
    """The band of the healthy run."""
    measured = gather(healthy, references=()).measured
    assert measured is not None
    return measure_reference("depth_small_test", [healthy], [measured.posterior])


@pytest.fixture
def edited(healthy: Path, tmp_path: Path) -> Callable[..., Path]:
    """edited(*overrides): a copy of the healthy run whose configuration has these settings."""

    def copy(*overrides: str) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(healthy, folder)
        (folder / "config.yaml").write_text(dump(load_config(healthy, overrides)), encoding="utf-8")
        return folder

    return copy


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """coloured(shuffled): a folder of pictures of one colour, captioned with their own colour or with any."""

    def make(shuffled: bool) -> Path:
        folder = tmp_path_factory.mktemp("coloured")
        colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
        names, draw = list(colours), np.random.default_rng(0)
        for number in range(160):
            name = names[number % 4]
            caption = names[draw.integers(4)] if shuffled else name
            Image.new("RGB", (16, 16), colours[name]).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a {caption} picture\n")
        return folder

    return make
