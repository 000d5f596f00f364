"""Sampling: files and their metadata, inputs of any kind."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from crossflow.cli import main
from crossflow.commands import sample
from crossflow.engine.sample import Pipeline


def test_pictures_carry_prompt_seed_and_settings(tiny_run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a red cube", "--prompt", "كرة حمراء 🎉"]
    assert main([*argv, "--num", "2", "--seed", "5", "--output", str(folder)]) == 0
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == ["0000_0.png", "0000_1.png", "0001_0.png", "0001_1.png", "grid.png"]
    picture = Image.open(folder / "0000_1.png")
    assert picture.info["prompt"] == "a red cube"
    assert picture.info["seed"] == "5"
    assert json.loads(picture.info["settings"])["steps"] == 2


def test_a_picture_is_reproduced_without_the_others(tiny_run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\n\na blue sphere\n")
    together, alone = tmp_path / "together", tmp_path / "alone"
    run = str(tiny_run("t2i"))
    argv = ["sample", "--checkpoint", run, "--output"]
    assert main([*argv, str(together), "--prompts", str(prompts), "--num", "2"]) == 0
    assert main([*argv, str(alone), "--prompt", "a blue sphere"]) == 0
    np.testing.assert_array_equal(
        np.array(Image.open(together / "0001_0.png")), np.array(Image.open(alone / "0000.png"))
    )
    assert Image.open(together / "0001_0.png").info["item"] == "a blue sphere/0"


def test_sample_reads_pictures_of_any_size_and_skips_broken_ones(tiny_run, tmp_path: Path, photo: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(photo, tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(photo.read_bytes()[:60])
    Image.new("L", (1, 1)).save(tmp_path / "in" / "c.png")
    for task in ("depth", "sr", "caption"):
        folder = tmp_path / task
        argv = ["sample", "--checkpoint", str(tiny_run(task)), "--input", str(tmp_path / "in")]
        assert main([*argv, "--output", str(folder)]) == 0
        assert "skipped" in capsys.readouterr().err
    assert np.load(tmp_path / "depth" / "a_depth.npy").shape == (20, 28)
    assert Image.open(tmp_path / "depth" / "a_depth_mm.png").mode == "I;16"
    assert Image.open(tmp_path / "sr" / "a_x4.png").size == (112, 80)
    assert Image.open(tmp_path / "sr" / "c_x4.png").size == (4, 4)
    assert {path.name for path in (tmp_path / "caption").glob("*.txt")} == {"a.txt", "c.txt"}


def test_a_full_disk_is_reported_in_one_sentence(refused, tiny_run, tmp_path: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write raises it, without a name

    run = str(tiny_run("t2i"))
    monkeypatch.setattr(os, "fsync", full)
    argv = ["sample", "--checkpoint", run, "--prompt", "a cube", "--output", str(tmp_path / "out")]
    assert "disk is full" in refused(*argv)
    assert not (tmp_path / "out").exists()


def test_files_are_written_beside_the_next_batch_in_the_order_of_the_prompts(
    refused, tiny_run, tmp_path: Path, monkeypatch
) -> None:
    began, outputs, written = [threading.Event() for _ in range(3)], Pipeline.outputs, sample.write_result
    order: list[str] = []

    def sampling(self, *arguments):
        next(event for event in began if not event.is_set()).set()
        return outputs(self, *arguments)

    def writing(model, result, folder: Path) -> list[Path]:
        assert len(order) == 2 or began[len(order) + 1].wait(timeout=20), "the next batch has not begun"
        order.append(result.stem)
        return written(model, result, folder)

    def failing(model, result, folder: Path) -> list[Path]:
        if result.stem == "0001":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(model, result, folder)

    monkeypatch.setattr(Pipeline, "outputs", sampling)
    prompts = [word for prompt in ("a red cube", "a cube", "a blue sphere") for word in ("--prompt", prompt)]
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--batch", "1", *prompts, "--output"]
    monkeypatch.setattr(sample, "write_result", writing)
    assert main([*argv, str(tmp_path / "out")]) == 0
    assert order == ["0000", "0001", "0002"]
    monkeypatch.setattr(Pipeline, "outputs", outputs)
    monkeypatch.setattr(sample, "write_result", failing)
    assert "disk is full" in refused(*argv, str(tmp_path / "full"))
    assert {path.name for path in (tmp_path / "full").glob("*.png")} == {"0000.png"}


def test_unknown_words_are_named_once(tiny_run, tmp_path: Path, capsys) -> None:
    run = str(tiny_run("t2i"))
    argv = ["sample", "--checkpoint", run, "--prompt", "a red zebra", "--prompt", "a zebra on a cube"]
    assert main([*argv, "--output", str(tmp_path / "a")]) == 0
    error = capsys.readouterr().err
    assert error.count("cannot follow them: zebra.") == 1
    assert "cube" not in error
    argv = ["arithmetic", "--checkpoint", run, "--base", "a red cube", "--plus", "a giraffe"]
    assert main([*argv, "--output", str(tmp_path / "b")]) == 0
    assert "giraffe" in capsys.readouterr().err
