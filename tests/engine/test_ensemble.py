"""Ensembles: their members are the outputs of --num, their files say how far these lie apart."""

from pathlib import Path

import numpy as np
import pytest

import crossflow
from crossflow.cli import main
from crossflow.data.combined import combined_depth, combined_pictures
from crossflow.data.images import save_png
from crossflow.engine.ensemble import ensemble


def test_depth_combines_to_its_median_and_a_normal_spread_to_its_deviation() -> None:
    maps = 4 * (1 + 0.1 * np.random.default_rng(0).standard_normal((2001, 3, 2)))
    combined = combined_depth(list(maps.astype(np.float32)))
    assert combined.value.dtype == combined.uncertainty.dtype == np.float32
    np.testing.assert_allclose(combined.value, np.median(maps, 0), rtol=1e-5)
    np.testing.assert_allclose(combined.uncertainty, 0.1, rtol=0.1)
    np.testing.assert_allclose(combined_depth(list(10 * maps)).uncertainty, combined.uncertainty, rtol=1e-4)


def test_pictures_combine_to_their_mean() -> None:
    pictures = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 60)]
    combined = combined_pictures(pictures)
    assert (combined.value == 30).all()
    np.testing.assert_allclose(combined.uncertainty, np.std([10, 20, 60]), rtol=1e-6)
    assert combined.uncertainty.shape == (2, 3)


def test_an_ensemble_of_a_run_is_that_of_its_outputs_and_is_written(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    file = save_png(picture, tmp_path / "photo.png")
    pipe = crossflow.load(tiny_run("depth"))
    members = pipe(picture, num=3, seed=2, mode=False).raw
    expected = combined_depth(members)
    np.testing.assert_allclose(ensemble(pipe, picture, 3, seed=2, batch_size=2).value, expected.value, rtol=1e-5)
    assert expected.uncertainty.min() > 0
    sample = ["sample", "--checkpoint", str(tiny_run("depth")), "--input", str(file), "--seed", "2", "--ensemble", "3"]
    assert main([*sample, "--output", str(tmp_path / "out")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out/photo_depth.npy"), expected.value, rtol=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "out/photo_uncertainty.npy"), expected.uncertainty, rtol=1e-3)
    assert (tmp_path / "out/photo_uncertainty.png").is_file()
    assert main([*sample, "--num", "2"]) == 2
    assert "give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"), [("sr", "source of the run has no variance"), ("t2i", "nothing to combine")]
)
def test_members_that_are_equal_or_different_answers_are_refused(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    file = save_png(np.zeros((16, 16, 3), np.uint8), tmp_path / "photo.png")
    asked = ["--prompt", "a cube"] if task == "t2i" else ["--input", str(file)]
    assert main(["sample", "--checkpoint", str(tiny_run(task)), *asked, "--ensemble", "2"]) == 2
    assert message in capsys.readouterr().err
