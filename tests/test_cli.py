"""Every command on tiny runs, and what bad input is answered with: one paragraph, a non-zero status, nothing lost."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.commands.console import progress_bar
from crossflow.core.backbones import BACKBONES
from crossflow.core.settings import shipped
from crossflow.core.solvers import SOLVERS
from crossflow.data.readers import READERS
from crossflow.engine.sample import load

TASKS = ("t2i", "caption", "depth", "sr")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 28, 3), dtype=np.uint8)).save(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error of a command that must be refused: one paragraph on stderr, status 2, no traceback."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


# What works.


@pytest.mark.parametrize("task", TASKS)
def test_a_run_directory_is_complete(tiny_run, task: str) -> None:
    folder = tiny_run(task)
    for name in (
        "config.yaml",
        "model.safetensors",
        "ema.safetensors",
        "metrics.jsonl",
        "manifest.json",
        "scores.json",
    ):
        assert (folder / name).is_file(), name
    assert (folder / "samples" / "final.png").is_file()
    assert list((folder / "checkpoints").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["data"]["fingerprint"]) == 32
    kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "val"} <= set(kinds)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_writes_scores_with_their_manifest_and_a_page(tiny_run, tmp_path: Path, task: str) -> None:
    folder = tmp_path / "evaluation"
    assert main(["evaluate", "--checkpoint", str(tiny_run(task)), "--num", "6", "--output", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scores"]["num_items"] == 6
    manifest = metrics["manifest"]
    assert manifest["data"]["split"] == "test"
    assert {"sample", "seed", "weights", "image_size", "versions", "num_items"} <= set(manifest)
    assert len((folder / "items.jsonl").read_text().splitlines()) == 6
    assert "<img" in (folder / "index.html").read_text()
    assert (folder / "pictures.png").is_file()


def test_sample_draws_prompts_several_times_and_says_so_in_the_file(tiny_run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a red cube", "--prompt", "كرة حمراء 🎉"]
    assert main([*argv, "--num", "2", "--seed", "5", "--output", str(folder)]) == 0
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == ["0000_0.png", "0000_1.png", "0001_0.png", "0001_1.png", "grid.png"]
    picture = Image.open(folder / "0000_1.png")
    assert picture.info["prompt"] == "a red cube"
    assert picture.info["seed"] == "5"
    assert json.loads(picture.info["settings"])["steps"] == 2


def test_one_picture_can_be_made_again_alone(tiny_run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\n\na blue sphere\n")
    together, alone = tmp_path / "together", tmp_path / "alone"
    run = str(tiny_run("t2i"))
    assert (
        main(["sample", "--checkpoint", run, "--prompts", str(prompts), "--num", "2", "--output", str(together)]) == 0
    )
    assert main(["sample", "--checkpoint", run, "--prompt", "a blue sphere", "--output", str(alone)]) == 0
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
        assert (
            main(
                [
                    "sample",
                    "--checkpoint",
                    str(tiny_run(task)),
                    "--input",
                    str(tmp_path / "in"),
                    "--output",
                    str(folder),
                ]
            )
            == 0
        )
        assert "skipped" in capsys.readouterr().err
    assert np.load(tmp_path / "depth" / "a_depth.npy").shape == (20, 28)
    assert Image.open(tmp_path / "depth" / "a_depth_mm.png").mode == "I;16"
    assert Image.open(tmp_path / "sr" / "a_x4.png").size == (112, 80)
    assert Image.open(tmp_path / "sr" / "c_x4.png").size == (4, 4)
    assert (tmp_path / "caption" / "a.txt").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_latent_tools_work_for_every_task(tiny_run, tmp_path: Path, photo: Path, task: str) -> None:
    run = str(tiny_run(task))
    a, b = ("a red cube", "a blue sphere") if task == "t2i" else (str(photo), str(photo))
    assert (
        main(
            [
                "interpolate",
                "--checkpoint",
                run,
                "--from",
                a,
                "--to",
                b,
                "--frames",
                "3",
                "--output",
                str(tmp_path / "i"),
            ]
        )
        == 0
    )
    argv = ["arithmetic", "--checkpoint", run, "--base", a, "--minus", b, "--strength", "0.5", "--strength", "1"]
    assert main([*argv, "--output", str(tmp_path / "a")]) == 0
    if task != "caption":
        assert (tmp_path / "i" / "animation.gif").is_file()
        assert (tmp_path / "a" / "grid.png").is_file()
    made = "a red cube" if task == "caption" else str(photo)
    if task == "depth":
        made = str(tmp_path / "depth.png")
        Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(made)
    assert main(["invert", "--checkpoint", run, "--input", made, "--output", str(tmp_path / "v")]) == 0
    assert (tmp_path / "v" / "latent.safetensors").is_file()


def test_latent_tools_say_how_they_were_told_to_work(tiny_run, tmp_path: Path, capsys, monkeypatch) -> None:
    run = str(tiny_run("t2i"))
    argv = ["interpolate", "--checkpoint", run, "--from", "a red cube", "--to", "a ball", "--frames", "3", "--fps", "4"]
    monkeypatch.setattr("crossflow.engine.animation.can_write_mp4", lambda: False)
    assert main([*argv, "--kind", "slerp", "--noise", "own", "--output", str(tmp_path / "i"), "steps=1"]) == 0
    assert "crossflow-toolkit[video]" in capsys.readouterr().out
    with Image.open(tmp_path / "i" / "001.png") as frame:
        said = frame.info
    assert (said["from"], said["to"], said["kind"], said["noise"]) == ("a red cube", "a ball", "slerp", "own")
    assert json.loads(said["settings"])["steps"] == 1
    with Image.open(tmp_path / "i" / "animation.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (3, 250)
    argv = ["arithmetic", "--checkpoint", run, "--base", "a red cube", "--plus", "a ball", "--restandardise", "--mean"]
    assert main([*argv, "mode=true", "--output", str(tmp_path / "a")]) == 0
    for file, label in (("000.png", "base"), ("001.png", "k = 1")):
        with Image.open(tmp_path / "a" / file) as picture:
            assert picture.info["what"] == label
            assert (picture.info["restandardise"], picture.info["mean"]) == ("true", "true")
    assert "'seed'" in refused(capsys, "sample", "--checkpoint", run, "--prompt", "a", "seed=3")
    argv = ["arithmetic", "--checkpoint", run, "--base", "a"]
    assert "--plus, --minus, or both" in refused(capsys, *argv)
    assert "NaNs" in refused(capsys, *argv, "--plus", "b", "--strength", "1e30", "--output", str(tmp_path / "n"))


def test_long_work_shows_a_bar_and_short_work_none(monkeypatch) -> None:
    from rich.progress import Progress

    started: list[Progress] = []
    monkeypatch.setattr(Progress, "start", lambda bar: started.append(bar))
    with progress_bar("short", after=60) as move:
        move(1, 1)
    assert started == []
    with progress_bar("long", after=0.01):
        time.sleep(0.3)
    assert len(started) == 1


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys) -> None:
    with progress_bar("scoring", every=0) as move:
        move(3, 8)
    assert capsys.readouterr().out == "scoring: 3 of 8\n"
    with progress_bar("scoring") as move:
        move(3, 8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("task", TASKS)
def test_the_noise_source_baseline_is_one_override(tiny_settings, blind_judge, tmp_path: Path, task: str) -> None:
    run = str(tmp_path / "run")
    argv = ["train", "--task", task, "--output", run, "source.kind=gaussian", "guidance.drop=0.2", *tiny_settings(task)]
    assert main(argv) == 0
    assert main(["evaluate", "--checkpoint", run, "--num", "2", "--guidance", "2"]) == 0


@pytest.mark.parametrize(
    ("task", "override"),
    [
        ("t2i", ["loss.encoder=sigmoid"]),
        ("t2i", ["loss.encoder=contrastive", "loss.encoder_target=text"]),
        ("t2i", ["loss.encoder=reconstruction", "loss.encoder_target=text"]),
        ("t2i", ["source.kind=deterministic", "path.name=sincos", "time.law=uniform", "time.shift=3"]),
        ("t2i", ["source.kind=noisy", "loss.kl=released", "text.head=flatten"]),
        ("caption", ["caption.joint=true", "loss.encoder=contrastive", "loss.encoder_target=text"]),
        ("caption", ["loss.encoder=reconstruction", "loss.encoder_target=image", "caption.reading=0"]),
        ("depth", ["depth.target=disparity", "source.kind=deterministic"]),
        ("depth", ["depth.target=linear", "loss.encoder=none", "depth.augmentation.crop=0.5"]),
        ("depth", ["depth.augmentation.colour=0.2"]),
        ("sr", ["source.kind=variational", "sr.scale=2", "loss.kl=variance"]),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_variants_of_the_method_train(
    tiny_settings, blind_judge, tmp_path: Path, task: str, override: list[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--task", task, "--output", str(run), *tiny_settings(task), *override]) == 0
    assert (run / "scores.json").is_file()


def test_captioning_by_a_t2i_run_backwards(tiny_run, tiny_settings, tmp_path: Path, photo: Path, capsys) -> None:
    run = str(tmp_path / "run")
    settings = [*tiny_settings("caption"), "train.steps=0", f"caption.t2i={tiny_run('t2i')}"]
    assert main(["train", "--config", "caption_from_t2i", "--output", run, *settings]) == 0
    assert main(["sample", "--checkpoint", run, "--input", str(photo), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "photo.txt").is_file()


def test_a_run_goes_on_where_it_was(tiny_settings, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*tiny_settings("depth"), "train.save_every=1", "train.log_every=1"]
    assert main(["train", "--task", "depth", "--output", str(whole), *settings, "train.steps=4"]) == 0
    assert (
        main(
            [
                "train",
                "--task",
                "depth",
                "--output",
                str(parts),
                *settings,
                "train.steps=4",
                "train.max_minutes=0.00001",
            ]
        )
        == 0
    )
    assert main(["train", "--output", str(parts), "--resume", "auto", "train.max_minutes=null"]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_dry_run_says_what_a_run_takes_and_trains_nothing(tiny_settings, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--task", "sr", "--dry-run", *tiny_settings("sr")]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory", "time", "disk"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["tasks", "configs", "datasets", "solvers", "backbones"])
def test_list_names_what_there_is(capsys, what: str) -> None:
    assert main(["list", what]) == 0
    known = {
        "tasks": TASKS,
        "configs": shipped(),
        "datasets": READERS.names(),
        "solvers": SOLVERS.names(),
        "backbones": BACKBONES.names(),
    }
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line[1:2].strip()} == set(known[what])  # the others go on with a row


# What is refused.


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "'train'"),
        (["train"], "--task"),
        (["train", "--config", "t2i_tinny"], "t2i_tiny"),
        (["train", "--config", "nowhere/recipe.yaml"], "does not exist"),
        (["train", "--task", "sr", "--config", "t2i_tiny"], "'t2i'"),
        (["train", "--task", "sr", "train.stepz=3"], "train.steps"),
        (["train", "--task", "sr", "train.steps=many"], "train.steps = 'many'"),
        (["train", "--task", "sr", "train.steps"], "key=value"),
        (["train", "--task", "sr", "sample.solver=euller", "--dry-run"], "euler"),
        (["train", "--task", "sr", "backbone.size=huge", "--dry-run"], "tiny"),
        (["train", "--task", "sr", "sr.crop=30", "--dry-run"], "multiple"),
        (["train", "--task", "t2i", "--data", "skimage", "--dry-run"], "captions"),
        (["train", "--task", "t2i", "--data", "coco:nowhere", "--dry-run"], "nowhere"),
        (["train", "--task", "t2i", "--data", "cocoa:nowhere", "--dry-run"], "coco"),
        (["train", "--task", "t2i", "--resume", "auto"], "--output"),
        (["sample", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere does not exist"),
        (["evaluate", "--checkpoint", "."], "not a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_answered_with_what_was_possible(
    capsys, tmp_path: Path, monkeypatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_refused(capsys) -> None:
    assert main(["train", "--task", "t3i"]) == 2
    assert "'t2i'" in capsys.readouterr().err


def test_an_empty_folder_and_a_folder_of_broken_pictures_are_refused(capsys, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    run = tmp_path / "run"
    assert "data" in refused(capsys, "train", "--task", "sr", "--data", f"folder:{data}", "--output", str(run))
    for number in range(4):
        (data / f"{number}.png").write_bytes(b"not a picture")
    error = refused(capsys, "train", "--task", "sr", "--data", f"folder:{data}", "--output", str(run))
    assert "4 items are bad" in error or "items are bad" in error or "not one item" in error


def test_a_run_is_not_overwritten(capsys, tiny_run, tiny_settings) -> None:
    folder = tiny_run("depth")
    before = (folder / "model.safetensors").read_bytes()
    assert "--resume auto" in refused(
        capsys, "train", "--task", "depth", "--output", str(folder), *tiny_settings("depth")
    )
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_refused_run_leaves_its_folder_to_the_corrected_one(capsys, tiny_settings, tmp_path: Path) -> None:
    argv = ["train", "--task", "sr", "--output", str(tmp_path / "run"), *tiny_settings("sr")]
    assert "'tiny'" in refused(capsys, *argv, "backbone.size=tinny")
    assert main(argv) == 0
    assert "--resume auto" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("override", "said"), [("data.val=pairs:gone", "gone"), ("data.image_size=16", "none can be scored")]
)
def test_data_that_cannot_be_scored_are_refused_before_the_training(
    capsys, tiny_settings, tmp_path: Path, override: str, said: str
) -> None:
    run = tmp_path / "run"
    assert said in refused(capsys, "train", "--task", "sr", "--output", str(run), *tiny_settings("sr"), override)
    assert not (run / "checkpoints").exists()


def test_a_run_is_resumed_with_its_own_settings_only(capsys, tiny_run) -> None:
    error = refused(capsys, "train", "--output", str(tiny_run("depth")), "--resume", "auto", "train.lr=0.5")
    assert "train.lr" in error


def test_a_batch_larger_than_the_data_trains(tiny_settings, tmp_path: Path) -> None:
    argv = ["train", "--task", "sr", "--output", str(tmp_path / "run"), *tiny_settings("sr")]
    assert main([*argv, "data.num_train=3", "train.batch_size=8"]) == 0


@pytest.mark.parametrize("kept", ["tokenizer/tokenizer.json", "codec/codec.json"])
def test_a_run_with_damaged_files_is_neither_used_nor_resumed(capsys, tiny_run, kept: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run("t2i"), broken)
    (broken / kept).write_bytes((broken / kept).read_bytes()[:40])
    assert str(broken) in refused(capsys, "sample", "--checkpoint", str(broken), "--prompt", "a cube")
    assert str(broken) in refused(capsys, "train", "--output", str(broken), "--resume", "auto", "train.steps=3")


def test_checkpoints_of_another_task_or_damaged_ones_are_refused(capsys, tiny_run, tmp_path: Path, photo: Path) -> None:
    assert "takes prompts" in refused(capsys, "sample", "--checkpoint", str(tiny_run("t2i")), "--input", str(photo))
    assert "takes pictures" in refused(capsys, "sample", "--checkpoint", str(tiny_run("sr")), "--prompt", "a red cube")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run("sr"), broken)
    weights = broken / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(capsys, "sample", "--checkpoint", str(broken), "--input", str(photo))
    settings = yaml.safe_load((broken / "config.yaml").read_text())
    settings["backbone"]["width"] = 32
    (broken / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "does not fit" in refused(
        capsys, "sample", "--checkpoint", str(broken), "--weights", "model", "--input", str(photo)
    )
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_run("sr"), mixed)
    shutil.copy(tiny_run("depth") / "ema.safetensors", mixed / "ema.safetensors")
    assert "does not fit" in refused(capsys, "sample", "--checkpoint", str(mixed), "--input", str(photo))


def test_unreadable_inputs_are_refused_by_name(capsys, tiny_run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    run = str(tiny_run("depth"))
    assert "bad.png" in refused(capsys, "sample", "--checkpoint", run, "--input", str(bad))
    assert "bad.png" in refused(capsys, "interpolate", "--checkpoint", run, "--from", str(bad), "--to", str(bad))
    for name in ("none.png", "bad.png"):
        error = refused(capsys, "invert", "--checkpoint", run, "--input", str(tmp_path / name))
        assert f"{name} cannot be inverted" in error
    latin = tmp_path / "prompts.txt"
    latin.write_bytes("ein grüner Würfel".encode("latin-1"))
    assert "UTF-8" in refused(capsys, "sample", "--checkpoint", str(tiny_run("t2i")), "--prompts", str(latin))
    assert "unavailable" in refused(capsys, "evaluate", "--checkpoint", run, "--device", "gpu7")


def test_a_jointly_trained_text_decoder_is_the_one_that_is_used(tiny_settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*tiny_settings("caption"), "caption.joint=true"]
    assert main(["train", "--task", "caption", "--output", str(run), *settings]) == 0
    used = load(run).task.text.state_dict()
    before, after = load_file(run / "text_autoencoder" / "model.safetensors"), load_file(run / "objective.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in used.items())
    assert all(torch.equal(value, after[f"extra_losses.0.autoencoder.{name}"]) for name, value in used.items())


def test_an_evaluation_does_without_the_training_data(tiny_run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run("depth"), run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": "pairs:gone", "val": "scenes"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--checkpoint", str(run), "--num", "2", "--seed", "3", "--weights", "model"]) == 0
    folder = run / "evaluation" / "scenes-test-euler2-seed3-model"
    assert "gone" in json.loads((folder / "metrics.json").read_text())["notes"][-1]


def test_an_unknown_solver_is_refused_with_near_names(capsys, tiny_run) -> None:
    error = refused(capsys, "sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a cube", "--solver", "eulr")
    assert "'euler'" in error


def test_a_full_disk_is_one_sentence(capsys, tiny_run, tmp_path: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write raises it, without a name

    run = str(tiny_run("t2i"))
    monkeypatch.setattr(os, "fsync", full)
    argv = ["sample", "--checkpoint", run, "--prompt", "a cube", "--output", str(tmp_path / "out")]
    assert "disk is full" in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()
