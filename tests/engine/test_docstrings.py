"""The examples in the docstrings run as they stand, on tiny runs."""

import doctest
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import crossflow
from crossflow.engine import latents, outputs, sample, score, train
from crossflow.tasks import load_config


def code_of(owner: object) -> str:
    """The indented paragraphs of a docstring, without those of an argument list."""
    paragraphs = inspect.cleandoc(owner.__doc__ or "").split("\n\n")
    code = [textwrap.dedent(text) for text in paragraphs if all(line.startswith("    ") for line in text.splitlines())]
    return "\n".join(code)


@pytest.fixture
def namespace(tiny_run, tiny_settings, tmp_path: Path, monkeypatch) -> dict[str, object]:
    """What the examples take for granted: trained runs, a loaded one, a picture; tiny sizes instead of the recipes'."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "t2i").symlink_to(tiny_run("t2i"))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "cube.png")
    monkeypatch.chdir(tmp_path)

    def load_tiny(recipe: str, overrides: tuple[str, ...] = ()) -> object:
        return load_config(recipe, [*overrides, *tiny_settings(recipe.removesuffix("_tiny"))])

    names = {name: getattr(module, name) for module in (latents, train) for name in module.__dict__ if name[0] != "_"}
    return names | {
        "crossflow": crossflow,
        "Path": Path,
        "load_config": load_tiny,
        "pipe": crossflow.load(tiny_run("t2i")),
    }


@pytest.mark.parametrize(
    "owner",
    [sample.Pipeline, outputs.Outputs, train.train, train.Run, latents.interpolate, latents.arithmetic, latents.invert],
)
def test_the_example_runs(owner: Callable[..., object], namespace: dict[str, object]) -> None:
    code = code_of(owner)
    assert code
    exec(compile(code, f"the docstring of {owner.__qualname__}", "exec"), namespace)


@pytest.mark.parametrize("module", [score])
def test_docstring_sessions_run(module: object) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
