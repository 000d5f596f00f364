"""A run finds its data from any directory, says what to do when they have moved, and accepts others only on request."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from crossflow.cli import main
from crossflow.data.readers import resolve_spec
from crossflow.engine.sample import load


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """The directory a run is started in, with twelve pictures in pictures/."""
    folder = tmp_path / "start"
    (folder / "pictures").mkdir(parents=True)
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(place: Path, tiny_settings) -> Path:
    """A run on these pictures that stopped early."""
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


@pytest.mark.slow
def test_specs_are_kept_as_written_and_work_from_any_directory(run: Path, elsewhere: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == "folder:pictures@all"
    assert main(["evaluate", "--checkpoint", str(run), "--num", "2", "--weights", "model"]) == 0
    assert main(["train", "--output", str(run), "--resume", "auto", "train.max_minutes=null"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == "folder:pictures@all"


def test_the_present_directory_is_searched_first(run: Path, elsewhere: Path) -> None:
    (elsewhere / "pictures").mkdir()
    shutil.copy(run.parent / "pictures" / "0.png", elsewhere / "pictures" / "only.png")
    assert load(run).dataset("train").reader.ids == ["only.png"]


@pytest.mark.slow
def test_a_message_says_how_to_name_data_that_have_moved(run: Path, elsewhere: Path, capsys) -> None:
    (run.parent / "pictures").rename(elsewhere / "moved")
    error = refused(capsys, "evaluate", "--checkpoint", str(run), "--num", "2", "--weights", "model")
    for words in ("'pictures' does not exist", str(run.parent), "--data SPEC", "--resume auto --data SPEC"):
        assert words in error
    assert main(["evaluate", "--checkpoint", str(run), "--data", "folder:moved@all", "--num", "2"]) == 0
    assert "'pictures' does not exist" in refused(capsys, "train", "--output", str(run), "--resume", "auto")
    argv = ["train", "--output", str(run), "--resume", "auto", "train.max_minutes=null", "--data", "folder:moved@all"]
    assert main(argv) == 0
    kept = yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]
    assert kept == f"folder:{elsewhere / 'moved'}@all", "a relative path would be resolved where the run was started"


@pytest.mark.slow
def test_changed_data_are_refused_unless_accepted(run: Path, capsys) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    (run.parent / "pictures" / "3.png").unlink()
    error = refused(capsys, *RESUME)
    for words in ("have changed", "12 items", "11 items", "--data-changed"):
        assert words in error
    assert sorted((run / "checkpoints").iterdir()) == checkpoints
    before = json.loads((run / "manifest.json").read_text())["data"]
    assert main([*RESUME, "--data-changed"]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["num_items"] == 11
    assert manifest["earlier_data"] == [before]
    assert main([*RESUME, "train.steps=4"]) == 0, "the accepted data are its data"


def test_one_changed_pixel_is_noticed(run: Path, capsys) -> None:
    picture = run.parent / "pictures" / "3.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(picture)
    assert "have changed" in refused(capsys, *RESUME)


@pytest.mark.slow
def test_a_run_without_a_manifest_asks_before_it_resumes(run: Path, capsys) -> None:
    (run / "manifest.json").write_text("{}")
    assert "does not describe its training data" in refused(capsys, *RESUME)
    assert main([*RESUME, "--data-changed"]) == 0


def test_relative_specs_are_resolved_in_a_folder(place: Path, tmp_path: Path, monkeypatch) -> None:
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
        assert resolve_spec(spec, place) == expected
    (tmp_path / "pictures").mkdir()
    assert resolve_spec("folder:pictures", place) == "folder:pictures"
    assert resolve_spec("folder:pictures", place, prefer_current=False) == f"folder:{there}"
