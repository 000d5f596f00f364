"""The speed benchmark measures what it says; how fast is not tested."""

from pathlib import Path

from crossflow.benchmarks.speed import render_scenes, training


def test_scenes_are_rendered_and_counted() -> None:
    assert render_scenes(3, 5, 8) == 5


def test_training_steps_are_timed_and_nothing_is_kept(tiny_settings, tmp_path: Path) -> None:
    (row,) = training(["sr_tiny"], tmp_path, [s for s in tiny_settings("sr") if not s.startswith("data.num_train")])
    assert row["seconds_per_step"] > 0
    assert row["batch_size"] == 4
    assert not list(tmp_path.glob("*/checkpoints/step_*"))
