"""The speed benchmark measures what its rows say; the speed itself is not tested."""

import json
from pathlib import Path

import pytest
import torch

from crossflow.benchmarks.speed import reading, released_files
from crossflow.benchmarks.speed.comparison import SMALL_SIZES, agreement, comparison
from crossflow.benchmarks.speed.evaluation import evaluation_speed
from crossflow.benchmarks.speed.measuring import Shares, profiled
from crossflow.benchmarks.speed.page import page
from crossflow.benchmarks.speed.released_step import rotated
from crossflow.benchmarks.speed.rendering import render_scenes, rendering_speed
from crossflow.benchmarks.speed.sampling import PARTS, sampling_speed
from crossflow.benchmarks.speed.training import Case, forward_operations, training_speed
from crossflow.cli import main
from crossflow.core.errors import UserError

FLOWTOK = (
    *("text.feature_width=64", "source.width=64", "source.hidden=32", "source.heads=2", "source.depth=1"),
    *("backbone.width=32", "backbone.depth=1", "backbone.heads=2", "data.image_size=32", "train.batch_size=2"),
)


def test_scenes_are_rendered_and_counted() -> None:
    assert render_scenes(5, 3, 8) == 5


@pytest.mark.slow
def test_rendering_is_measured_for_each_size_and_number_of_processes(forked_pools: None) -> None:
    calls: list[int] = []
    rows = rendering_speed(sizes=(8,), processes=(1, 2), count=8, on_row=lambda: calls.append(1))
    assert [(row["size"], row["processes"]) for row in rows] == [(8, 1), (8, 2)]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert len(calls) == 2


@pytest.mark.slow
def test_training_steps_are_timed_without_leaving_files(tiny_settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = training_speed([Case("sr_tiny", tuple(tiny_settings("sr")))], steps=2)
    parts = [row[f"{phase}_seconds"] for phase in ("data", "forward", "backward", "optimizer", "ema")]
    assert all(seconds > 0 for seconds in parts)
    assert row["samples_per_second"] == pytest.approx(4 / row["seconds_per_step"], rel=0.05)
    assert row["batch_size"] == 4
    assert 0 < row["utilisation"] < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_twice_the_batch_takes_twice_the_operations(tiny_settings, tmp_path: Path) -> None:
    """Nothing but the batch changes them: twice the batch, twice the operations."""
    counts = []
    for size in (4, 8):
        case = Case("depth_tiny", (*tiny_settings("depth"), f"train.batch_size={size}"))
        trainer = case.open(tmp_path / str(size)).trainer()
        counts.append(forward_operations(trainer, trainer.trial(1)))
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.slow
def test_sampling_is_timed_part_by_part_with_random_frozen_networks() -> None:
    (row,) = sampling_speed([Case("flowtok_b", (*FLOWTOK, "sample.steps=2"), small=True)], batch_size=2)
    seconds = [row[f"{part}_seconds"] for part in PARTS]
    assert all(value > 0 for value in seconds)
    assert row["outputs_per_second"] > 0
    assert (row["batch_size"], row["device"], row["steps"], row["evaluations"]) == (2, "cpu", 2, 4)


@pytest.mark.slow
def test_training_reads_a_cache_of_random_features_that_fits_the_networks(tmp_path: Path) -> None:
    run = Case("flowtok_b", FLOWTOK, small=True).open(tmp_path)
    assert run.config.data.train == f"cache:{tmp_path / 'cache'}"
    assert len(list(run.trainer().trial(1))) == 1


@pytest.mark.slow
def test_evaluation_is_timed_after_its_judge_is_there(tiny_settings) -> None:
    (row,) = evaluation_speed([Case("depth_tiny", tuple(tiny_settings("depth")))], num=4)
    assert row["items"] == 4
    assert 0 < row["sampling_seconds"] < row["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SMALL_SIZES)
def test_product_and_released_manner_compute_the_same(size: str) -> None:
    rows = comparison({size: SMALL_SIZES[size]}, ["float32"], rounds=1)
    assert [row["part"] for row in rows] == ["training step", "guided sampling"]
    assert rows[0]["loss_difference"] < 1e-5
    assert rows[0]["gradient_difference"] < 1e-4
    assert rows[1]["samples_difference"] < 1e-4
    assert all(row["ratio"] > 0 for row in rows)


def test_different_results_are_an_error() -> None:
    with pytest.raises(UserError, match=r"loss by 0\.2"):
        agreement({"loss": 0.2, "gradient": 0.0}, {"loss": 0.1, "gradient": 0.1})


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (Shares(products=0.9, idle=0.0, data=0.4), "data"),
        (Shares(products=0.9, idle=0.5), "launch overhead"),
        (Shares(products=0.6, idle=0.1), "matrix products"),
        (Shares(products=0.2, idle=0.1), "memory traffic"),
    ],
)
def test_what_bounds_a_row_is_said_in_words(shares: Shares, words: str) -> None:
    assert shares.bound().startswith(words)


@pytest.mark.slow
def test_the_time_of_matrix_products_is_told_from_that_of_sums() -> None:
    a = torch.randn(256, 256)
    products, _ = profiled(lambda: [a @ a for _ in range(20)], a.device)
    sums, _ = profiled(lambda: [a + a for _ in range(20)], a.device)
    assert products.products > 0.8 > 0.2 > sums.products


def test_the_page_has_a_table_for_each_part_with_units() -> None:
    row = {
        "recipe": "depth_tiny",
        "seconds_per_step": 0.5,
        "peak_bytes": 2 * 10**9,
        "longest_operators": [("aten::mm", 0.6)],
    }
    lines = page({"training": [row], "versions": {"torch": "2"}}, "crossflow benchmark speed").splitlines()
    assert "| recipe | seconds per step | peak GB |" in lines
    assert "| depth_tiny | 0.5 | 2 |" in lines
    assert "- depth_tiny: aten::mm 60%" in lines


def test_unconditional_targets_are_exchanged_as_in_the_release() -> None:
    target, drawn = torch.arange(4.0), torch.tensor([True, False, True, True])
    assert rotated(target, drawn)[1].tolist() == [3, 1, 0, 2]
    assert not rotated(target, torch.tensor([False, True, False, False]))[0].any()


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
