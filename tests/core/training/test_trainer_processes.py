"""Runs in processes of their own: killed at any time, told to end, and two that do the work of one."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file

from crossflow.core.training import checkpoint as state

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("tiny_run.py"))


class Start(Protocol):
    def __call__(self, run_dir: Path, *arguments: str, own_session: bool = False) -> Any: ...


@pytest.fixture
def start(forked: ModuleType, tmp_path: Path) -> Start:
    """start(run_dir, ...): a training in a process of its own."""

    def run(run_dir: Path, *arguments: str, own_session: bool = False) -> Any:
        return forked.Forked([PROGRAM, str(run_dir), *arguments], tmp_path / "output.log", own_session=own_session)

    return run


def wait_for_step(run_dir: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come: {process.output()}")


def weights(run_dir: Path) -> dict[str, bytes]:
    newest = state.checkpoints(run_dir / "checkpoints")[0]
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


def test_a_repeatedly_killed_run_ends_like_an_uninterrupted_one(tiny: ModuleType, start: Start, tmp_path: Path) -> None:
    settings = ["steps=40", "save_every=3", "log_every=1", "--seconds", "0.004"]
    start(tmp_path / "through", *settings).finish()
    generator = random.Random(0)
    kills = 0
    for step in (5, 14, 23, 31):
        process = start(tmp_path / "killed", *settings, "--resume", "auto")
        wait_for_step(tmp_path / "killed", step, process)
        time.sleep(generator.random() * 0.05)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    start(tmp_path / "killed", *settings, "--resume", "auto").finish()
    assert weights(tmp_path / "through") == weights(tmp_path / "killed")
    assert tiny.lines(tmp_path / "through") == tiny.lines(tmp_path / "killed")
    assert list((tmp_path / "killed").rglob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_saves_and_reports_that_it_stopped(
    tiny: ModuleType, start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "steps=100000", "log_every=1", "num_workers=1", "--seconds", "0.002")
    wait_for_step(tmp_path, 6, process)
    process.send_signal(number)
    process.finish()
    status, step, reason = json.loads((tmp_path / "result.json").read_text())
    assert (status, reason) == ("stopped", number.name)
    assert tiny.lines(tmp_path)[-1]["step"] == step
    state.verify(tmp_path / "checkpoints" / f"step_{step:08d}")


def test_data_workers_ignore_signals_to_the_process_group(start: Start, tmp_path: Path) -> None:
    settings = ["steps=100000", "log_every=1", "num_workers=2", "--seconds", "0.002"]
    process = start(tmp_path, *settings, own_session=True)
    wait_for_step(tmp_path, 6, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.finish()
    assert json.loads((tmp_path / "result.json").read_text())[0] == "stopped"


@pytest.mark.parametrize("arguments", [[], ["accumulate=2"], ["--contrastive"], ["--contrastive", "accumulate=2"]])
def test_two_processes_train_like_one(
    tiny: ModuleType, forked: ModuleType, start: Start, tmp_path: Path, arguments: list[str]
) -> None:
    common = ["--no-dropout", "log_every=1", *arguments]
    both = forked.ranks(2, [PROGRAM, str(tmp_path / "two"), *common], tmp_path)
    start(tmp_path / "one", *common).finish()
    for process in both:
        process.finish()
    states = [state.read_state(tmp_path / name / "checkpoints" / "step_00000012") for name in ("one", "two")]
    assert [content["world_size"] for content in states] == [1, 2]
    for alone, shared in zip(tiny.lines(tmp_path / "one"), tiny.lines(tmp_path / "two"), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=1e-5)
    for file in ("model.safetensors", "ema.safetensors", "objective.safetensors"):
        first, second = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert all(first[name].allclose(second[name], atol=1e-6) for name in first)


def test_two_processes_stop_together_and_one_can_continue(
    tiny: ModuleType, forked: ModuleType, start: Start, tmp_path: Path
) -> None:
    """A launcher hands the signal on to both."""
    common = ["--no-dropout", "log_every=1", "steps=60"]
    processes = forked.ranks(2, [PROGRAM, str(tmp_path / "parts"), *common, "--seconds", "0.02"], tmp_path)
    wait_for_step(tmp_path / "parts", 4, processes[0])
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.finish()
    status, step, _ = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert status == "stopped"
    assert 4 <= step < 60
    start(tmp_path / "parts", *common, "--resume", "auto").finish()
    start(tmp_path / "through", *common).finish()
    for alone, shared in zip(tiny.lines(tmp_path / "through"), tiny.lines(tmp_path / "parts"), strict=True):
        assert {**alone, "kind": 0} == pytest.approx({**shared, "kind": 0}, rel=1e-4)


def test_an_error_of_the_main_process_ends_both_processes(forked: ModuleType, start: Start, tmp_path: Path) -> None:
    start(tmp_path, "steps=4").finish()
    for process in forked.ranks(2, [PROGRAM, str(tmp_path), "steps=4"], tmp_path):
        output = process.finish(status=1)
        assert output.count("user error:") == 1
        assert "--resume auto" in output
