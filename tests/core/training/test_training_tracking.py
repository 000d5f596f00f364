"""metrics.jsonl can be taken back to a step; progress says what a watcher wants to know."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from crossflow.core.errors import UserError
from crossflow.core.training.tracking import MetricsFile, RichProgress, check_trackers, describe, duration

LINE = {
    "kind": "train", "step": 20, "loss": 0.51234, "flow": 0.5, "grad_norm": 2.0, "lr": 1e-4, "epoch": 0.2,
    "seconds_per_step": 0.5, "samples_per_second": 8.0,
}  # fmt: skip


def test_lines_after_a_step_are_taken_back(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"kind": "train", "step": step, "loss": step / 10})
    metrics.append({"kind": "val", "step": 20, "score": 1.0})
    last = metrics.truncate(20)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 10), ("train", 20), ("val", 20)]
    assert last == {"train": lines[1], "val": lines[2]}


def test_an_unfinished_last_line_goes(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "train", "step": 1, "loss": 0.5})
    with metrics.path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    metrics.truncate(5)
    metrics.append({"kind": "train", "step": 2, "loss": 0.4})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "val", "step": 1, "score": float("nan"), "other": float("inf")})
    assert json.loads(metrics.path.read_text()) == {"kind": "val", "step": 1, "score": None, "other": None}


def test_truncating_nothing_is_fine(tmp_path: Path) -> None:
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


def test_a_plain_line_per_report_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, width=60))
    progress.begin(0, 100)
    progress.advance(1)
    progress.report(LINE)
    progress.report({"kind": "val", "step": 20, "score": 0.75})
    progress.report({"kind": "sample", "step": 20})
    progress.note("Saved [somewhere].")
    progress.end()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 20/100 loss 0.5123  flow 0.5  0.5 s/step  40s left",
        "step 20/100 val: score 0.75",
        "Saved [somewhere].",
    ]


def test_a_bar_with_losses_and_remaining_time_on_a_terminal() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, width=120, force_terminal=True, legacy_windows=False))
    progress.begin(10, 100)
    progress.report(LINE)
    progress.advance(20)
    progress.end()
    shown = stream.getvalue()
    assert "20/100" in shown
    assert "flow 0.5" in shown
    assert "40s left" in shown


def test_describe_leaves_out_what_is_not_a_loss() -> None:
    assert describe(LINE, 20) == "loss 0.5123  flow 0.5  0.5 s/step  0s left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75.2, "1m15s"), (7300, "2h01m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
