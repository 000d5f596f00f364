"""A process of a training that dies ends the others with a message; what is left resumes."""

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
def test_a_killed_process_ends_the_other_with_a_message(forked: ModuleType, tmp_path: Path, lost: int) -> None:
    run = tmp_path / "run"
    arguments = [PROGRAM, str(run), "steps=100000", "save_every=60", "timeout_minutes=0.05", "--seconds", "0.002"]
    processes = forked.ranks(2, arguments, tmp_path)
    wait_for_step(run, 63, processes[1 - lost])  # between two saves
    processes[lost].kill()
    output = processes[1 - lost].finish(status=1)
    assert "user error: Another process of this training has ended, or has not answered for 0.05 minutes" in output
    assert "--resume auto continues from there" in output
    newest = state.checkpoints(run / "checkpoints")[0]
    state.verify(newest)
    forked.Forked(
        [PROGRAM, str(run), f"steps={int(newest.name[5:]) + 2}", "--resume", "auto"], tmp_path / "log"
    ).finish()
