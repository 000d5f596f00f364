"""The models that ship with the package: small, described, and making what their example shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
def test_a_model_makes_its_example(name: str, tmp_path: Path) -> None:
    """Another machine rounds otherwise: pictures agree, bits need not."""
    asked = ["--prompt", PROMPT] if name.startswith("t2i") else ["--input", str(ZOO / "scene.png")]
    assert main(["sample", "--checkpoint", SHIPPED + name, "--seed", "0", *asked, "--output", str(tmp_path)]) == 0
    examples = sorted((MODELS[name] / "samples").iterdir())
    assert examples
    for example in examples:
        output = tmp_path / example.name
        if example.suffix == ".png":
            shown, again = (np.asarray(Image.open(path), dtype=float) for path in (example, output))
            assert shown.std() > 0.05 * shown.max()
            assert np.abs(again - shown).mean() < 0.01 * shown.max()
        elif example.suffix == ".txt":
            assert output.read_text(encoding="utf-8") == example.read_text(encoding="utf-8")


def test_models_are_listed_and_near_names_suggested(capsys) -> None:
    assert main(["list", "models", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [SHIPPED + name for name in MODELS]
    assert main(["sample", "--checkpoint", "zoo:srr", "--prompt", "a cube"]) == 2
    assert "'zoo:sr'" in capsys.readouterr().err
