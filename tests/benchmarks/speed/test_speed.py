"""The speed benchmark measures what it says; how fast is not tested."""

import json
from pathlib import Path

import pytest
import torch

from crossflow.benchmarks.speed import reading
from crossflow.benchmarks.speed.measures import render_scenes, training
from crossflow.benchmarks.speed.sampling import PARTS, generation
from crossflow.cli import main
from crossflow.core.errors import UserError


def test_scenes_are_rendered_and_counted() -> None:
    assert render_scenes(3, 5, 8) == 5


def test_training_steps_are_timed_and_nothing_is_kept(tiny_settings, tmp_path: Path) -> None:
    (row,) = training(["sr_tiny"], tmp_path, [s for s in tiny_settings("sr") if not s.startswith("data.num_train")])
    assert row["seconds_per_step"] > 0
    assert row["batch_size"] == 4
    assert not list(tmp_path.glob("*/checkpoints/step_*"))


SMALL = ["text.feature_width=64", "source.width=64", "source.hidden=32", "source.heads=2", "source.depth=1"]


@pytest.mark.parametrize(
    ("recipe", "small"),
    [
        ("t2i_256_clip_dimr", ["backbone.size=tiny", "data.image_size=32"]),
        ("flowtok_b", ["backbone.width=32", "backbone.depth=1", "backbone.heads=2", "data.image_size=32"]),
    ],
)
def test_sampling_is_timed_part_by_part(recipe: str, small: list[str]) -> None:
    (row,) = generation([recipe], [*SMALL, *small], batch_size=2, compiled=[False])
    seconds = [row[f"{part}_seconds"] for part in PARTS]
    assert all(one > 0 for one in seconds)
    assert row["images_per_second"] == pytest.approx(2 / sum(seconds), rel=0.05)
    assert (row["batch_size"], row["device"], row["compiled"]) == (2, "cpu", False)


def test_sampling_of_other_recipes_is_refused() -> None:
    with pytest.raises(UserError, match="frozen text encoder"):
        generation(["sr_tiny"])


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
    assert [row["memory"] for row in found["cache"]] == ["warm", "cold"] * len(reading.CONTENTS)
    assert all(row["bytes_ratio"] < 0.5 and row["ratio"] > 0 for row in found["cache"])
    assert "scenes" not in found
