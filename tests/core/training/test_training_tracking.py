"""metrics.jsonl can be cut back to a step; unknown trackers are named."""

import importlib.util
import json
from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.core.training.tracking import MetricsFile, check_trackers


def test_lines_after_a_step_are_removed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"kind": "train", "step": step, "loss": step / 10})
    metrics.append({"kind": "val", "step": 20, "score": 1.0})
    last = metrics.truncate(20)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 10), ("train", 20), ("val", 20)]
    assert last == {"train": lines[1], "val": lines[2]}


def test_an_unfinished_last_line_is_removed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "train", "step": 1, "loss": 0.5})
    with metrics.path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    metrics.truncate(5)
    metrics.append({"kind": "train", "step": 2, "loss": 0.4})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2]


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "val", "step": 1, "score": float("nan"), "other": float("inf")})
    assert json.loads(metrics.path.read_text()) == {"kind": "val", "step": 1, "score": None, "other": None}


def test_truncating_a_missing_file_creates_nothing(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path / "metrics.jsonl").truncate(0) == {}
    assert list(tmp_path.iterdir()) == []


def test_metrics_on_a_full_disk_is_a_user_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="--resume auto"):
        MetricsFile(full).append({"kind": "train", "step": 1})


def test_unknown_and_missing_trackers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(["wandb"])
