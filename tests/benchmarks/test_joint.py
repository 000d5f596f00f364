"""Joint against separate trainings: equal parameters, and a page of every side's scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossflow.benchmarks.joint import NARROWER, SIDES, equal_width
from crossflow.cli import main
from crossflow.engine.joint.config import load_joint
from crossflow.engine.joint.run import estimate_jointly
from crossflow.engine.train import estimate


@pytest.mark.slow
def test_narrower_networks_have_as_many_parameters_together() -> None:
    config = load_joint("joint_tiny", ["backbone.depth=2"], "depth,sr")
    joint, width = sum(estimate_jointly(config).parameters.values()), equal_width(config)
    narrow = load_joint("joint_tiny", ["backbone.depth=2", f"backbone.width={width}"], "depth,sr")
    separate = sum(sum(estimate(own).parameters.values()) for own in narrow.members.values())
    assert width < 192
    assert separate == pytest.approx(joint, rel=0.1)


@pytest.mark.slow
def test_sides_are_trained_in_equal_time(tiny_settings, tmp_path: Path, monkeypatch, capsys) -> None:
    """With a time per step that need not be measured: half of a side's time, so that the joint run has two steps."""
    cost = SimpleNamespace(cpu_seconds_per_step=0.06)
    monkeypatch.setattr("crossflow.benchmarks.joint.dry_run", lambda config: cost)
    monkeypatch.setattr("crossflow.benchmarks.joint.dry_run_jointly", lambda config: cost)
    small = [setting for setting in tiny_settings("depth,sr") if not setting.startswith("train.steps")]
    budget = ["--cpu-minutes", "0.002", "--num", "2", "--output", str(tmp_path)]
    assert main(["benchmark", "joint", "joint_tiny", "--task", "depth,sr", *budget, *small]) == 0
    results = json.loads((tmp_path / "joint.json").read_text())
    assert set(results["scores"]) == set(SIDES)
    assert all(each["sr"]["psnr_y"]["mean"] > 5 for each in results["scores"].values())
    assert results["plan"]["steps"]["joint"] == 2
    assert results["plan"]["steps"]["separate sr"] == 1
    parameters = results["plan"]["parameters"]
    assert parameters["joint"] < parameters["separate"]
    assert NARROWER in (tmp_path / "joint.md").read_text()
    assert main(["benchmark", "joint", "joint_tiny", "--task", "depth,sr", *budget[:1], "9", *budget[2:], *small]) == 2
    assert "minutes 0.002 -> 9" in capsys.readouterr().err
