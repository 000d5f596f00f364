"""The models that ship with the package: small, described, and making what their example shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crossflow
from crossflow.cli import main
from crossflow.core.recipes import ZOO
from crossflow.engine.describe import describe
from crossflow.networks.hub import SHIPPED, shipped_models

MODELS = shipped_models()
PROMPT = "a red cube left of a blue sphere"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_they_fit_into_a_package() -> None:
    assert all(size(folder) < 8e6 for folder in MODELS.values())
    assert size(ZOO) < 30e6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_is(name: str) -> None:
    run = describe(SHIPPED + name)
    assert run.weights is not None
    assert run.manifest["command"]
    assert any(each.num_items and each.leading() for each in run.measurements)
    card = (MODELS[name] / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "model-index" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_makes_its_example(name: str) -> None:
    """Another machine rounds otherwise: what is shown agrees, bits need not."""
    (example,) = (MODELS[name] / "samples").glob("0000*")
    pipe = crossflow.load(SHIPPED + name)
    result = pipe(PROMPT if pipe.task.name == "t2i" else Image.open(ZOO / "scene.png"), seed=0)[0]
    if isinstance(result, str):
        assert result == example.read_text(encoding="utf-8").strip()
    else:
        shown = np.asarray(Image.open(example), dtype=float)
        assert shown.std() > 20
        assert np.abs(np.asarray(result, dtype=float) - shown).mean() < 2


def test_models_are_listed_and_near_names_suggested(capsys) -> None:
    assert main(["list", "models", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [SHIPPED + name for name in MODELS]
    assert main(["sample", "--checkpoint", "zoo:srr", "--prompt", "a cube"]) == 2
    assert "'zoo:sr'" in capsys.readouterr().err
