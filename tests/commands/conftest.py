"""A photograph, and how a refused command looks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.cli import main


@pytest.fixture(autouse=True)
def without_java(monkeypatch) -> None:
    """METEOR and SPICE take a minute each, and are tested with the captioning metric."""
    monkeypatch.setattr("crossflow.tasks.caption.metric.JAVA_METRICS", ())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 28, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*argv): the error of a command that must be refused, one paragraph on stderr with status 2."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
        return error

    return run
