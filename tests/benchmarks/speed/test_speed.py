"""The speed benchmark measures what its rows say; the speed itself is not tested."""

import json
from pathlib import Path

import pytest
import torch

from crossflow.benchmarks.speed import reading, released_files
from crossflow.benchmarks.speed.rendering import render_scenes, rendering_speed
from crossflow.benchmarks.speed.run import training_speed
from crossflow.benchmarks.speed.sampling import PARTS, sampling_speed
from crossflow.cli import main
from crossflow.core.errors import UserError


def test_scenes_are_rendered_and_counted() -> None:
    assert render_scenes(5, 3, 8) == 5


@pytest.mark.slow
def test_rendering_is_measured_for_each_size_and_number_of_processes() -> None:
    calls: list[int] = []
    rows = rendering_speed(sizes=(8,), processes=(1, 2), count=8, on_row=lambda: calls.append(1))
    assert [(row["size"], row["processes"]) for row in rows] == [(8, 1), (8, 2)]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert len(calls) == 2


@pytest.mark.slow
def test_training_steps_are_timed_without_leaving_files(tiny_settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [setting for setting in tiny_settings("sr") if not setting.startswith("data.num_train")]
    (row,) = training_speed(["sr_tiny"], settings)
    assert row["seconds_per_step"] > 0
    assert row["batch_size"] == 4
    assert not list(tmp_path.iterdir())


SMALL = ["text.feature_width=64", "source.width=64", "source.hidden=32", "source.heads=2", "source.depth=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "small"),
    [
        ("t2i_256_clip_dimr", ["backbone.size=tiny", "data.image_size=32"]),
        ("flowtok_b", ["backbone.width=32", "backbone.depth=1", "backbone.heads=2", "data.image_size=32"]),
    ],
)
def test_sampling_is_timed_part_by_part(recipe: str, small: list[str]) -> None:
    (row,) = sampling_speed([recipe], [*SMALL, *small], batch_size=2, compiled=[False])
    seconds = [row[f"{part}_seconds"] for part in PARTS]
    assert all(value > 0 for value in seconds)
    assert row["images_per_second"] == pytest.approx(2 / sum(seconds), rel=0.05)
    assert (row["batch_size"], row["device"], row["compiled"]) == (2, "cpu", False)


def test_sampling_of_other_recipes_is_refused() -> None:
    with pytest.raises(UserError, match="frozen text encoder"):
        sampling_speed(["sr_tiny"])


def test_a_cache_and_released_files_give_the_same_batches(tmp_path: Path) -> None:
    released_files.write_released(tmp_path / "released", 6, released_files.CONTENTS[-1])
    reading.write_cache(tmp_path / "cache", tmp_path / "released")
    files = sorted((tmp_path / "released").glob("*.npy"))
    released = released_files.read_released(files)
    cached, _ = reading.read_cached(reading.cached_examples(tmp_path / "cache"), [(0, index) for index in range(6)])
    torch.testing.assert_close(cached[0].mean.float(), released[0].mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(cached[0].log_var.float(), released[0].log_var, atol=2e-3, rtol=2e-3)
    assert torch.equal(cached[2], released[2])
    torch.testing.assert_close(cached[1].float()[cached[2]], released[1][cached[2]], atol=2e-3, rtol=2e-3)
    assert cached[1].shape == released[1].shape


@pytest.mark.slow
def test_reading_is_measured_for_both_kinds_of_files_warm_and_cold(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 4)
    output = tmp_path / "speed.json"
    monkeypatch.setattr(reading.reading_speed, "__defaults__", (16, 1, lambda: None))
    assert main(["benchmark", "speed", "--part", "cache", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert [row["memory"] for row in results["cache"]] == ["warm", "cold"] * len(released_files.CONTENTS)
    assert all(row["bytes_ratio"] < 0.5 and row["ratio"] > 0 for row in results["cache"])
    assert "scenes" not in results
