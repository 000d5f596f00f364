"""A process of a training that dies or hangs ends the others with a message; what is left resumes."""

import json
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crossflow.core.training import checkpoint as state

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).parents[1] / "core" / "training" / "tiny_run.py")


def wait_for_step(run: Path, step: int, process: Any) -> None:
    deadline, metrics = time.monotonic() + 120, run / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert process.poll() is None, process.output()
        assert time.monotonic() < deadline, process.output()
        time.sleep(0.01)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_other_with_a_message(
    forked: ModuleType, tmp_path: Path, lost: int, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = [PROGRAM, str(run), "steps=100000", "save_every=60", "timeout_minutes=0.05", "--seconds", "0.002"]
    processes = forked.ranks(2, arguments, tmp_path)
    wait_for_step(run, 63, processes[1 - lost])  # between two saves
    processes[lost].send_signal(number)
    output = processes[1 - lost].finish(status=1)
    processes[lost].kill()
    assert f"user error: Process {lost} has ended, or has not answered for 0.05 minutes" in output
    assert "(train.timeout_minutes), while this one waited for the gradients of step" in output
    assert "--resume auto continues from there" in output
    newest = state.checkpoints(run / "checkpoints")[0]
    state.verify(newest)
    if lost == 0:
        forked.Forked(
            [PROGRAM, str(run), f"steps={int(newest.name[5:]) + 2}", "--resume", "auto"], tmp_path / "log"
        ).finish()


def test_a_process_that_connects_last_finds_the_others(forked: ModuleType, tmp_path: Path) -> None:
    """None ends, with the store that it may hold, before all have joined."""
    (tmp_path / "program.py").write_text(
        "import os, time\n"
        "from torch.distributed import PrefixStore\n"
        "from crossflow.core import distributed\n"
        "clone = PrefixStore.clone\n"
        "PrefixStore.clone = lambda store: time.sleep(int(os.environ['RANK'])) or clone(store)\n"
        "distributed.device()\n"
    )
    for process in forked.ranks(2, [str(tmp_path / "program.py")], tmp_path):
        assert process.wait(20) == 0, process.output()


@pytest.mark.parametrize("kind", ["validate", "sample"])
def test_a_signal_to_one_process_ends_an_evaluation_of_all(
    tiny: ModuleType, forked: ModuleType, tmp_path: Path, kind: str
) -> None:
    """The second process, which gets it, shares in the validation, or waits for the samples of the first one."""
    every = {"validate": "eval_every=2", "sample": "sample_every=2"}[kind]
    common = ["--no-dropout", "log_every=1", "grace_seconds=10"]
    processes = forked.ranks(2, [PROGRAM, str(tmp_path / "parts"), *common, every, "--endless", kind], tmp_path)
    wait_for_step(tmp_path / "parts", 2, processes[0])
    time.sleep(0.5)
    start = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.finish()
    assert time.monotonic() - start < 10
    assert json.loads((tmp_path / "parts" / "result.json").read_text()) == ["stopped", 2, "SIGTERM"]
    for process in forked.ranks(2, [PROGRAM, str(tmp_path / "parts"), *common, "--resume", "auto"], tmp_path):
        process.finish()
    assert [line["step"] for line in tiny.lines(tmp_path / "parts")] == list(range(1, 13))


def test_a_step_of_several_processes_that_takes_too_long_is_left_with_a_checkpoint(
    tiny: ModuleType, forked: ModuleType, tmp_path: Path
) -> None:
    """None can give it up; the weights before it are saved beside it, and nothing is lost when all are killed."""
    common = ["--no-dropout", "log_every=1", "grace_seconds=0.4"]
    checkpoints = tmp_path / "parts" / "checkpoints"
    processes = forked.ranks(2, [PROGRAM, str(tmp_path / "parts"), *common, "--endless", "step"], tmp_path)
    wait_for_step(tmp_path / "parts", 6, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while [state.step_of(path) for path in state.checkpoints(checkpoints)] != [6, 4]:
        assert time.monotonic() < deadline, processes[0].output()
        time.sleep(0.05)
    for process in processes:
        process.kill()
    state.verify(checkpoints / "step_00000006")
    for process in forked.ranks(2, [PROGRAM, str(tmp_path / "parts"), *common, "--resume", "auto"], tmp_path):
        process.finish()
    for process in forked.ranks(2, [PROGRAM, str(tmp_path / "through"), *common], tmp_path):
        process.finish()
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")
    assert tiny.lines(tmp_path / "through") == tiny.lines(tmp_path / "parts")
