"""Interpolation, arithmetic and inversion on the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.engine.sample import load
from crossflow.tasks import task_names


def outputs(folder: Path, name: str) -> list[np.ndarray]:
    """What the task wrote for an output, file by file: pixels, arrays or text."""
    values = []
    for path in sorted(folder.glob(f"{name}*")):
        if path.suffix == ".png":
            with Image.open(path) as picture:
                values.append(np.array(picture).astype(float))
        else:
            values.append(np.load(path) if path.suffix == ".npy" else np.array(path.read_text()))
    return values


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Equal texts; pixels and metres within what kernels differ by when a batch has another size."""
    return len(a) == len(b) and all(
        np.array_equal(x, y) if x.dtype.kind == "U" else np.allclose(x, y, rtol=1e-3, atol=1.0)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_latent_tools_agree_for_every_task(tiny_run, tmp_path: Path, photo: Path, task: str) -> None:
    """The first frame of an interpolation, the base of an arithmetic and a zero difference are the same output."""
    run = str(tiny_run(task))
    other = tmp_path / "other.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (20, 28, 3), dtype=np.uint8)).save(other)
    a, b = ("a red cube", "a blue sphere") if load(run).task.input_kind == "text" else (str(photo), str(other))
    walk, sums, nothing = (tmp_path / name for name in ("walk", "sums", "nothing"))
    model = ["--checkpoint", run, "--output"]
    assert main(["interpolate", *model, str(walk), "--from", a, "--to", b, "--frames", "3"]) == 0
    assert main(["arithmetic", *model, str(sums), "--base", a, "--minus", b, "--strength", "0.5"]) == 0
    assert main(["arithmetic", *model, str(nothing), "--base", a, "--plus", b, "--minus", b]) == 0
    base = outputs(walk, "000")
    assert base
    assert same(base, outputs(sums, "000"))
    assert same(base, outputs(nothing, "001"))
    assert len(list(walk.glob("002*"))) == len(base)
    if load(run).task.pictures(load(run)(a).raw):
        assert not all(np.array_equal(x, y) for x, y in zip(base, outputs(sums, "001"), strict=True))
        with Image.open(walk / "animation.gif") as gif:
            assert gif.n_frames == 3


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_an_inversion_comes_back_to_its_input(tiny_run, tmp_path: Path, photo: Path, capsys, task: str) -> None:
    value = {"caption": "a red cube", "depth": str(tmp_path / "depth.png")}.get(task, str(photo))
    Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(tmp_path / "depth.png")
    argv = ["invert", "--checkpoint", str(tiny_run(task)), "--input", value, "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    error = re.search(r"re-generated latent: ([\d.e+-]+)\.", capsys.readouterr().out)
    assert error
    assert float(error[1]) < 0.01
    assert load_file(tmp_path / "out" / "latent.safetensors")["z0"].isfinite().all()
    for name, label in (("000", "input"), ("001", "re-generated")):
        for path in (tmp_path / "out").glob(f"{name}*.png"):
            with Image.open(path) as picture:
                assert picture.info["what"] == label


@pytest.mark.slow
def test_latent_tools_record_their_settings(tiny_run, tmp_path: Path, capsys, refused, monkeypatch) -> None:
    run = str(tiny_run("t2i"))
    argv = ["interpolate", "--checkpoint", run, "--from", "a red cube", "--to", "a ball", "--frames", "3", "--fps", "4"]
    monkeypatch.setattr("crossflow.engine.animation.can_write_mp4", lambda: False)
    assert main([*argv, "--kind", "slerp", "--noise", "own", "--output", str(tmp_path / "i"), "steps=1"]) == 0
    assert "crossflow-toolkit[video]" in capsys.readouterr().out
    with Image.open(tmp_path / "i" / "001.png") as frame:
        metadata = frame.info
    assert (metadata["from"], metadata["to"], metadata["kind"], metadata["noise"]) == (
        "a red cube",
        "a ball",
        "slerp",
        "own",
    )
    assert json.loads(metadata["settings"])["steps"] == 1
    with Image.open(tmp_path / "i" / "animation.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (3, 250)
    argv = ["arithmetic", "--checkpoint", run, "--base", "a red cube", "--plus", "a ball", "--restandardise", "--mean"]
    assert main([*argv, "mode=true", "--output", str(tmp_path / "a")]) == 0
    for file, label in (("000.png", "base"), ("001.png", "k = 1")):
        with Image.open(tmp_path / "a" / file) as picture:
            assert picture.info["what"] == label
            assert (picture.info["restandardise"], picture.info["mean"]) == ("true", "true")
    assert "'seed'" in refused("sample", "--checkpoint", run, "--prompt", "a", "seed=3")
    argv = ["arithmetic", "--checkpoint", run, "--base", "a"]
    assert "--plus, --minus, or both" in refused(*argv)
    assert "NaN" in refused(*argv, "--plus", "a red cube", "--strength", "1e30", "--output", str(tmp_path / "n"))
