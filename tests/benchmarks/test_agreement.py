"""Whether a device computes what the CPU does: the checks pass where it does, and fail where it does not."""

import json
import os
import re
import subprocess
from pathlib import Path

import click
import pytest
import torch

from crossflow.benchmarks import agreement
from crossflow.benchmarks.agreement import Check, difference, sampling_checks
from crossflow.cli import main
from crossflow.tasks import load_config

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


@pytest.mark.parametrize("small", ["", "1"])
def test_the_parts_of_the_gpu_day_are_commands_from_the_source_tree(tmp_path: Path, monkeypatch, small: str) -> None:
    """The interpreter is replaced by one that notes its arguments; the commands have tests of their own."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\ntest -f "$PYTHONPATH/crossflow/cli.py" && echo "$@" >> {tmp_path}/commands\n')
    interpreter.chmod(0o755)
    environment = {**os.environ, "SMALL": small, "PYTHON": str(interpreter), "PYTHONPATH": ""}
    environment["PARTS"] = (
        "agreement training_dimr training_dit sampling_flowtok sampling_dimr released_dimr released_dit"
    )
    script = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("0 parts failed")
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert len(commands) == (4 if small else 7)
    monkeypatch.setattr(click.Command, "invoke", lambda command, context: None)  # options are read, nothing runs
    for module, crossflow, *argv in commands:
        assert (module, crossflow) == ("-m", "crossflow")
        assert main(argv) == 0
        recipes = [argv[place + 1] for place, word in enumerate(argv) if word == "--recipe"]
        for recipe in recipes:
            load_config(recipe, [word for word in argv if re.fullmatch(r"[a-z_]+\.[a-z_]+=.*", word)])
    assert main([*argv, "--no-such-option"]) == 2


def test_a_failed_part_does_not_end_the_script_and_is_counted(tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "PYTHON": "false"}
    script = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all("failed with status 1" in line for line in lines[:-1])
    assert done.returncode == 4
