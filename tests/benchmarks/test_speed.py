"""The speed benchmark measures what it says; how fast is not tested."""

import json
from pathlib import Path

import torch

from crossflow.benchmarks import reading
from crossflow.benchmarks.speed import render_scenes, training
from crossflow.cli import main


def test_scenes_are_rendered_and_counted() -> None:
    assert render_scenes(3, 5, 8) == 5


def test_training_steps_are_timed_and_nothing_is_kept(tiny_settings, tmp_path: Path) -> None:
    (row,) = training(["sr_tiny"], tmp_path, [s for s in tiny_settings("sr") if not s.startswith("data.num_train")])
    assert row["seconds_per_step"] > 0
    assert row["batch_size"] == 4
    assert not list(tmp_path.glob("*/checkpoints/step_*"))


def test_a_cache_and_released_files_give_the_same_batches(tmp_path: Path) -> None:
    reading.write_released(tmp_path / "released", 6, reading.CONTENTS[-1])
    reading.write_cache(tmp_path / "cache", tmp_path / "released")
    files = sorted((tmp_path / "released").glob("*.npy"))
    theirs = reading.read_released(files)
    ours, _ = reading.read_cached(reading.cached_examples(tmp_path / "cache"), [(0, index) for index in range(6)])
    torch.testing.assert_close(ours[0].mean.float(), theirs[0].mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(ours[0].log_var.float(), theirs[0].log_var, atol=2e-3, rtol=2e-3)
    assert torch.equal(ours[2], theirs[2])
    torch.testing.assert_close(ours[1].float()[ours[2]], theirs[1][ours[2]], atol=2e-3, rtol=2e-3)
    assert ours[1].shape == theirs[1].shape


def test_reading_is_measured_for_both_kinds_of_files_warm_and_cold(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 4)
    output = tmp_path / "speed.json"
    monkeypatch.setattr(reading.reading, "__defaults__", (16, 1, lambda: None))
    assert main(["benchmark", "speed", "--part", "cache", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [row["memory"] for row in found["cache"]] == ["warm", "cold"] * 4
    assert all(row["bytes_ratio"] < 0.5 and row["ratio"] > 0 for row in found["cache"])
    assert "scenes" not in found
