"""Trainings: complete run directories, variants, continuation, refusals."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.core.settings import parse_overrides, read
from crossflow.engine.sample import load
from crossflow.tasks import task_names


def nested_items(settings: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from nested_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def value_at(settings: Mapping, name: str) -> object:
    for word in name.split("."):
        settings = settings[word]
    return settings


@pytest.mark.parametrize("task", task_names())
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


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_the_noise_source_baseline_is_one_override(tiny_settings, blind_judge, tmp_path: Path, task: str) -> None:
    run = tmp_path / "run"
    settings = ["source.kind=gaussian", "guidance.drop=0.2", *tiny_settings(task)]
    assert main(["train", "--task", task, "--output", str(run), *settings]) == 0
    assert load(run).model.source_encoder.kind == "gaussian"
    assert main(["evaluate", "--checkpoint", str(run), "--num", "2", "--guidance", "2"]) == 0
    (metrics,) = run.glob("evaluation/*/metrics.json")
    manifest = json.loads(metrics.read_text())["manifest"]
    assert manifest["evaluations"] == 2 * manifest["sample"]["steps"]


@pytest.mark.slow
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
    settings = [*tiny_settings(task), *override, "train.log_every=1"]
    assert main(["train", "--task", task, "--output", str(run), *settings]) == 0
    resolved = read(run)
    for name, value in nested_items(parse_overrides(override)):
        assert value_at(resolved, name) == value
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    scores = json.loads((run / "scores.json").read_text())["scores"]
    assert scores
    assert all(math.isfinite(score) for score in scores.values())


@pytest.mark.slow
def test_a_t2i_run_captions_backwards(tiny_run, tiny_settings, tmp_path: Path, photo: Path, capsys) -> None:
    run = str(tmp_path / "run")
    settings = [*tiny_settings("caption"), "train.steps=0", f"caption.t2i={tiny_run('t2i')}"]
    assert main(["train", "--config", "caption_from_t2i", "--output", run, *settings]) == 0
    assert main(["sample", "--checkpoint", run, "--input", str(photo), "--output", str(tmp_path / "out")]) == 0
    (caption,) = load(run)(str(photo)).captions
    assert (tmp_path / "out" / "photo.txt").read_text().strip() == caption


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(tiny_settings, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*tiny_settings("depth"), "train.save_every=1", "train.log_every=1", "train.steps=4"]
    train = ["train", "--task", "depth", "--output"]
    assert main([*train, str(whole), *settings]) == 0
    assert main([*train, str(parts), *settings, "train.max_minutes=0.00001"]) == 0
    assert not (parts / "checkpoints" / "step_00000004").exists()
    assert main(["train", "--output", str(parts), "--resume", "auto", "train.max_minutes=null"]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_dry_run_reports_costs_and_leaves_nothing(tiny_settings, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--task", "sr", "--dry-run", *tiny_settings("sr")]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory", "time", "disk"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_a_folder_of_broken_pictures_are_refused(refused, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    run = tmp_path / "run"
    assert "data" in refused("train", "--task", "sr", "--data", f"folder:{data}", "--output", str(run))
    for number in range(4):
        (data / f"{number}.png").write_bytes(b"not a picture")
    error = refused("train", "--task", "sr", "--data", f"folder:{data}", "--output", str(run))
    assert "bad" in error
    assert "1.png: not a picture in a known format" in error


def test_a_run_is_not_overwritten(refused, tiny_run, tiny_settings) -> None:
    folder = tiny_run("depth")
    before = (folder / "model.safetensors").read_bytes()
    assert "--resume auto" in refused("train", "--task", "depth", "--output", str(folder), *tiny_settings("depth"))
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_rejected_run_leaves_its_folder_free(refused, tiny_settings, tmp_path: Path) -> None:
    argv = ["train", "--task", "sr", "--output", str(tmp_path / "run"), *tiny_settings("sr")]
    assert "'tiny'" in refused(*argv, "backbone.size=tinny")
    assert main(argv) == 0
    assert "--resume auto" in refused(*argv)


@pytest.mark.parametrize(
    ("override", "message"), [("data.val=pairs:gone", "gone"), ("data.image_size=16", "can be scored")]
)
def test_unscorable_data_are_refused_before_training(
    refused, tiny_settings, tmp_path: Path, override: str, message: str
) -> None:
    run = tmp_path / "run"
    assert message in refused("train", "--task", "sr", "--output", str(run), *tiny_settings("sr"), override)
    assert not (run / "checkpoints").exists()


def test_a_run_is_resumed_with_its_own_settings_only(refused, tiny_run) -> None:
    error = refused("train", "--output", str(tiny_run("depth")), "--resume", "auto", "train.lr=0.5")
    assert "train.lr" in error


def test_a_batch_larger_than_the_data_trains(tiny_settings, tmp_path: Path) -> None:
    argv = ["train", "--task", "sr", "--output", str(tmp_path / "run"), *tiny_settings("sr")]
    assert main([*argv, "data.num_train=3", "train.batch_size=8", "train.log_every=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


@pytest.mark.slow
def test_joint_captioning_uses_the_jointly_trained_text_decoder(tiny_settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*tiny_settings("caption"), "caption.joint=true"]
    assert main(["train", "--task", "caption", "--output", str(run), *settings]) == 0
    used = load(run).task.text.state_dict()
    before, after = load_file(run / "text_autoencoder" / "model.safetensors"), load_file(run / "objective.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in used.items())
    assert all(torch.equal(value, after[f"extra_losses.0.autoencoder.{name}"]) for name, value in used.items())


def test_a_finished_run_is_not_scored_again(tiny_run, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run("sr"), run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--output", str(run), "--resume", "auto"]) == 0
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_run_interrupted_while_scored_says_that_its_steps_were_complete(tiny_run, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(tiny_run("sr"), tmp_path / "sr")
    (run / "scores.json").unlink()
    assert main(["train", "--output", str(run), "--resume", "auto"]) == 0
    out = capsys.readouterr().out
    assert "had completed its 2 steps before" in out
    assert "in 0.0 minutes" not in out
    assert (run / "scores.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["t2i_256_clip_dimr", "flowtok_b", "caption_351m", "depth_527m", "sr_505m"])
def test_a_dry_run_of_a_paper_recipe_needs_no_data(tmp_path: Path, capsys, monkeypatch, recipe: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"parameters .*flow [1-9]\d+\.\d\dM", out)
    assert re.search(r"memory +[1-9]\d*\.\d\d GiB \(weights", out)
    assert "can only be measured with the training data" in out
    assert list(tmp_path.iterdir()) == []
