"""`crossflow doctor` and `crossflow plot` as they are typed."""

import json
from pathlib import Path

import pytest

from crossflow.cli import main


def test_the_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "python" in out
    assert "cpu, " in out


@pytest.mark.slow
def test_a_plan_takes_settings_and_prints_its_size(capsys: pytest.CaptureFixture[str], tiny_settings) -> None:
    assert main(["doctor", "--task", "sr", *tiny_settings("sr")]) == 0
    out = capsys.readouterr().out
    assert "24 items, scenes" in out
    assert "activations" in out
    assert "Nothing stands in the way of this training." in out
    assert main(["doctor", "--task", "sr", *tiny_settings("sr"), "train.batch_size=32", "--strict"]) == 2
    assert "warning: A batch of 32 holds each of the 24 training items more than once." in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_described_and_examined(capsys: pytest.CaptureFixture[str], tiny_run) -> None:
    folder = tiny_run("depth")
    assert main(["doctor", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "posterior mean" in out
    assert "problem: 50 of the 2 steps are warm-up" in out
    assert main(["doctor", str(folder), "--no-measuring"]) == 0
    assert "posterior mean" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_reference_is_measured_from_runs(tiny_run, tmp_path: Path, refused) -> None:
    path = tmp_path / "mine.json"
    assert main(["doctor", str(tiny_run("depth")), "--save-reference", str(path)]) == 0
    assert json.loads(path.read_text())["recipe"] == "mine"
    assert "remove it first" in refused("doctor", str(tiny_run("depth")), "--save-reference", str(path))
    assert "needs the runs" in refused("doctor", "--save-reference", str(tmp_path / "other.json"))


def test_what_makes_no_sense_is_refused(refused, tmp_path: Path) -> None:
    assert "belongs to a training that is planned" in refused("doctor", "--data", "scenes")
    assert "holds no run" in refused("doctor", str(tmp_path))
    assert "has no metrics.jsonl" in refused("plot", str(tmp_path))


@pytest.mark.slow
def test_curves_are_printed_and_written(capsys: pytest.CaptureFixture[str], tiny_run, tmp_path: Path, refused) -> None:
    path = tmp_path / "curves.png"
    assert main(["plot", str(tiny_run("sr")), str(tiny_run("depth")), "--x", "minutes", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "flow: sr " in out  # a single point each
    assert f"Wrote {path}." in out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refused("plot", str(tiny_run("sr")), "--output", str(path))
