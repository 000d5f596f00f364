"""A sharded training through the command line: the run of one process, up to rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import crossflow
from crossflow.cli import main

pytestmark = pytest.mark.slow


def lines(run: Path) -> list[dict]:
    clock = ("seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds", "kind")
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in read]


def test_two_processes_train_score_and_sample_what_one_does(forked, tiny_run, tiny_settings, tmp_path: Path) -> None:
    alone, run = tiny_run("sr"), tmp_path / "run"
    settings = [*tiny_settings("sr"), "train.sharding=fsdp", "train.background_saves=true", "train.sample_every=1"]
    for process in forked.ranks(
        2, ["-m", "crossflow", "train", "--task", "sr", "--output", str(run), *settings], tmp_path
    ):
        process.finish()
    expected = [line for line in lines(alone) if "loss" in line]
    for line, shared in zip(expected, [line for line in lines(run) if "loss" in line], strict=True):
        assert line == pytest.approx(shared, rel=1e-3, abs=1e-6)
    scores = [json.loads((folder / "scores.json").read_text())["scores"] for folder in (alone, run)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    photo = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    pictures = [np.asarray(crossflow.load(str(folder))(photo, steps=2)[0], int) for folder in (alone, run)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1

    written = load_file(run / "ema.safetensors")
    (run / "ema.safetensors").unlink()
    assert main(["consolidate", str(run)]) == 0
    again = load_file(run / "ema.safetensors")
    assert all(again[name].equal(value) for name, value in written.items())
    assert main(["consolidate", str(tmp_path / "nowhere")]) == 2
