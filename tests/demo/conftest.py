"""A running page over the four recorded runs, and a folder with a training and an evaluation."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from crossflow.demo.models import Models

RUNS = Path(__file__).resolve().parents[1] / "golden" / "runs"


class Page(NamedTuple):
    url: str
    models: "Models"
    runs: Path
    """The folder behind --runs."""


@pytest.fixture(scope="session")
def models() -> "Models":
    """Two runs of text to image, and one of each other task."""
    from crossflow.demo.models import open_models
    from crossflow.engine.sample import load

    names = ("t2i", "t2i", "caption", "depth", "sr")
    return open_models([str(RUNS / name) for name in names], lambda name: load(name, device="cpu"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A run with curves, and an evaluation of the run t2i whose worst item is b."""
    folder = tmp_path_factory.mktemp("secret-place") / "runs"
    (folder / "first").mkdir(parents=True)
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "flow": 2 / step} for step in (1, 2, 3)]
    (folder / "first" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = folder / "scored"
    evaluation.mkdir()
    rows = [
        {"id": id, "prompt": f"<b>{id}</b>", "psnr_y": value} for id, value in (("a", 30.0), ("b", 10.0), ("c", 20.0))
    ]
    (evaluation / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"task": "t2i", "checkpoint": str(folder / "gone")}
    content = {"scores": {"psnr_y": 20.0}, "intervals": {}, "manifest": manifest}
    (evaluation / "metrics.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def page(models: "Models", runs: Path) -> Iterator[Page]:
    from crossflow.demo.page import Server

    with Server(models, runs) as server:
        yield Page(server.url.rstrip("/"), models, runs)


@pytest.fixture(scope="session")
def client(page: Page, tmp_path_factory):
    """gradio's own client of the page."""
    from gradio_client import Client

    downloads = tmp_path_factory.mktemp("downloads")
    yield Client(page.url, download_files=downloads, verbose=False, analytics_enabled=False)
    shutil.rmtree(downloads)
