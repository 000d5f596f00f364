"""Runs in processes of their own: killed at any time, told to end, and two that do the work of one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from crossflow.core.training import checkpoint as state

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("tiny_run.py")


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def start(run_dir: Path, *arguments: str, num_processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(PROGRAM), str(run_dir), *arguments]
    # Without a GPU even where there is one: two processes must not share it.
    return subprocess.Popen(
        command, env=environment(CUDA_VISIBLE_DEVICES=""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come: {process.communicate()[0]}")


def weights(run_dir: Path) -> dict[str, bytes]:
    newest = state.checkpoints(run_dir / "checkpoints")[0]
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


def test_a_repeatedly_killed_run_ends_like_an_uninterrupted_one(tiny: ModuleType, tmp_path: Path) -> None:
    settings = ["steps=40", "save_every=3", "log_every=1", "--seconds", "0.004"]
    finish(start(tmp_path / "through", *settings))
    generator = random.Random(0)
    kills = 0
    for step in (5, 14, 23, 31):
        process = start(tmp_path / "killed", *settings, "--resume", "auto")
        wait_for_step(tmp_path / "killed", step, process)
        time.sleep(generator.random() * 0.05)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills >= 3
    finish(start(tmp_path / "killed", *settings, "--resume", "auto"))
    assert weights(tmp_path / "through") == weights(tmp_path / "killed")
    assert tiny.lines(tmp_path / "through") == tiny.lines(tmp_path / "killed")
    assert list((tmp_path / "killed").rglob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_saves_and_reports_that_it_stopped(
    tiny: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "steps=100000", "log_every=1", "num_workers=1", "--seconds", "0.002")
    wait_for_step(tmp_path, 6, process)
    process.send_signal(number)
    finish(process)
    status, step, reason = json.loads((tmp_path / "result.json").read_text())
    assert (status, reason) == ("stopped", number.name)
    assert tiny.lines(tmp_path)[-1]["step"] == step
    state.verify(tmp_path / "checkpoints" / f"step_{step:08d}")


def test_data_workers_ignore_signals_to_the_process_group(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), "steps=100000", "log_every=1", "num_workers=2"]
    process = subprocess.Popen(
        [*command, "--seconds", "0.002"],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path, 6, process)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    assert json.loads((tmp_path / "result.json").read_text())[0] == "stopped"


@pytest.mark.parametrize("arguments", [[], ["accumulate=2"], ["--contrastive"], ["--contrastive", "accumulate=2"]])
def test_two_processes_train_like_one(tiny: ModuleType, tmp_path: Path, arguments: list[str]) -> None:
    common = ["--no-dropout", "log_every=1", *arguments]
    finish(start(tmp_path / "one", *common))
    finish(start(tmp_path / "two", *common, num_processes=2))
    states = [state.read_state(tmp_path / name / "checkpoints" / "step_00000012") for name in ("one", "two")]
    assert [content["world_size"] for content in states] == [1, 2]
    for alone, shared in zip(tiny.lines(tmp_path / "one"), tiny.lines(tmp_path / "two"), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=1e-5)
    for file in ("model.safetensors", "ema.safetensors", "objective.safetensors"):
        first, second = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert all(first[name].allclose(second[name], atol=1e-6) for name in first)


def test_two_processes_stop_together_and_one_can_continue(tiny: ModuleType, tmp_path: Path) -> None:
    common = ["--no-dropout", "log_every=1", "steps=60"]
    process = start(tmp_path / "parts", *common, "--seconds", "0.02", num_processes=2)
    wait_for_step(tmp_path / "parts", 4, process)
    process.send_signal(signal.SIGTERM)  # the launcher hands it on to both
    process.communicate(timeout=120)
    status, step, _ = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert status == "stopped"
    assert 4 <= step < 60
    finish(start(tmp_path / "parts", *common, "--resume", "auto"))
    finish(start(tmp_path / "through", *common))
    for alone, shared in zip(tiny.lines(tmp_path / "through"), tiny.lines(tmp_path / "parts"), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=1e-4)


def test_an_error_of_the_main_process_ends_both_processes(tmp_path: Path) -> None:
    finish(start(tmp_path, "steps=4"))
    process = start(tmp_path, "steps=4", num_processes=2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("user error:") == 2
    assert "--resume auto" in output
