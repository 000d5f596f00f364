"""Whether a device computes what the CPU does: the checks pass where it does, and fail where it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossflow.benchmarks import agreement
from crossflow.benchmarks.agreement import Check, difference, sampling_checks
from crossflow.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_difference_is_relative_and_nan_does_not_pass() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert difference(expected * 1.01, expected) == pytest.approx(0.01)
    assert Check("run", "loss", 0.1, 0.1).passes
    assert not Check("run", "loss", 0.11, 0.1).passes
    assert not Check("run", "loss", float("nan"), 0.1).passes


@pytest.mark.slow
def test_the_command_compares_devices_and_writes_its_checks(tmp_path: Path, tiny_run, capsys) -> None:
    output = tmp_path / "agreement.json"
    run = str(tiny_run("depth"))
    assert main(["benchmark", "agreement", run, "--recipe", "depth_tiny", "--output", str(output)]) == 0
    checks = json.loads(output.read_text())["checks"]
    assert {check["subject"] for check in checks} == {run, "depth_tiny"}
    assert [check["what"] for check in checks][-1] == "weights after resuming"
    assert all(check["passes"] for check in checks)
    assert "DIFFERS" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_device_that_computes_otherwise_is_an_error(tiny_run, monkeypatch, capsys) -> None:
    latents = agreement._latents
    calls: list[int] = []

    def wrong_the_second_time(pipe) -> torch.Tensor:
        calls.append(1)
        return latents(pipe) * (1.0 if len(calls) == 1 else 1.5)

    monkeypatch.setattr(agreement, "_latents", wrong_the_second_time)
    run = tiny_run("depth")
    assert not next(sampling_checks(run)).passes
    calls.clear()
    monkeypatch.setattr(agreement, "training_checks", lambda recipe, folder: iter(()))
    monkeypatch.setattr(agreement, "resume_check", lambda recipe, folder: Check(recipe, "resume", 0.0, 0.0))
    assert main(["benchmark", "agreement", str(run), "--recipe", "depth_tiny"]) != 0
    assert "differs from the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_of_the_gpu_day_runs_on_a_cpu_without_installing(tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "PYTHON": sys.executable, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    environment["PARTS"] = "agreement"  # the others run in the tests of their commands
    script = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    log = (tmp_path / "out/log.txt").read_text()
    assert done.returncode == 0, log[-4000:]
    assert done.stdout.splitlines()[-1].startswith("0 parts failed")
    assert all(check["passes"] for check in json.loads((tmp_path / "out/agreement.json").read_text())["checks"])


def test_a_failed_part_does_not_end_the_script_and_is_counted(tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "PYTHON": "false"}
    script = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all("failed with status 1" in line for line in lines[:-1])
    assert done.returncode == 4
