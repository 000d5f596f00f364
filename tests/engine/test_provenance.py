"""A run finds its data from anywhere, says what to do when they are gone, and does not go on with others unasked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from crossflow.cli import main
from crossflow.data.readers import located
from crossflow.engine.sample import load


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Where a run is started: pictures/ with twelve pictures."""
    folder = tmp_path / "start"
    (folder / "pictures").mkdir(parents=True)
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(place: Path, tiny_settings) -> Path:
    """A run on them that stopped before its end."""
    argv = ["train", "--task", "sr", "--data", "folder:pictures@all", "--output", "run", *tiny_settings("sr")]
    assert main([*argv, "train.steps=3", "train.save_every=1", "train.max_minutes=0.00001"]) == 0
    return place / "run"


RESUME = ["train", "--output", "run", "--resume", "auto", "train.max_minutes=null"]


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch, run: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_data_are_kept_as_given_and_found_from_anywhere(run: Path, elsewhere: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == "folder:pictures@all"
    assert main(["evaluate", "--checkpoint", str(run), "--num", "2", "--weights", "model"]) == 0
    assert main(["train", "--output", str(run), "--resume", "auto", "train.max_minutes=null"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == "folder:pictures@all"


def test_what_lies_here_comes_first(run: Path, elsewhere: Path) -> None:
    (elsewhere / "pictures").mkdir()
    shutil.copy(run.parent / "pictures" / "0.png", elsewhere / "pictures" / "only.png")
    assert load(run).task.dataset("train").reader.ids == ["only.png"]


def test_data_that_are_gone_are_named_with_the_way_to_say_where_they_are(run: Path, elsewhere: Path, capsys) -> None:
    (run.parent / "pictures").rename(elsewhere / "moved")
    error = refused(capsys, "evaluate", "--checkpoint", str(run), "--num", "2", "--weights", "model")
    for words in ("there is no 'pictures'", str(run.parent), "--data SPEC", "--resume auto --data SPEC"):
        assert words in error
    assert main(["evaluate", "--checkpoint", str(run), "--data", "folder:moved@all", "--num", "2"]) == 0
    assert "there is no 'pictures'" in refused(capsys, "train", "--output", str(run), "--resume", "auto")
    argv = ["train", "--output", str(run), "--resume", "auto", "train.max_minutes=null", "--data", "folder:moved@all"]
    assert main(argv) == 0
    kept = yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]
    assert kept == f"folder:{elsewhere / 'moved'}@all", "a relative place would be taken from where the run began"


def test_a_run_does_not_go_on_with_other_data_unasked(run: Path, capsys) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    (run.parent / "pictures" / "3.png").unlink()
    error = refused(capsys, *RESUME)
    for words in ("not what they were", "12 items", "11 items", "--data-changed"):
        assert words in error
    assert sorted((run / "checkpoints").iterdir()) == checkpoints
    before = json.loads((run / "manifest.json").read_text())["data"]
    assert main([*RESUME, "--data-changed"]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["num_items"] == 11
    assert manifest["earlier_data"] == [before]
    assert main([*RESUME, "train.steps=4"]) == 0, "these are now its data"


def test_a_changed_pixel_is_seen(run: Path, capsys) -> None:
    picture = run.parent / "pictures" / "3.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(picture)
    assert "not what they were" in refused(capsys, *RESUME)


def test_a_run_that_does_not_know_its_data_asks(run: Path, capsys) -> None:
    (run / "manifest.json").write_text("{}")
    assert "does not tell what its training data were" in refused(capsys, *RESUME)
    assert main([*RESUME, "--data-changed"]) == 0


def test_relative_places_are_taken_from_a_folder(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = f"{place}/pictures"
    for spec, expected in [
        ("folder:pictures", f"folder:{there}"),
        ("folder:pictures@val", f"folder:{there}@val"),
        ("pictures@all", f"{there}@all"),
        (" pictures", there),
        ("folder:nothing", "folder:nothing"),
        ("folder:", "folder:"),
        ("scenes", "scenes"),
        ("scenes@val", "scenes@val"),
        (f"folder:{there}", f"folder:{there}"),
        ("nofmt:pictures", "nofmt:pictures"),
    ]:
        assert located(spec, place) == expected
    (tmp_path / "pictures").mkdir()
    assert located("folder:pictures", place) == "folder:pictures"
    assert located("folder:pictures", place, here_first=False) == f"folder:{there}"
