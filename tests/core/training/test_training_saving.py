"""Saving in the background: what is written is the state at the call, and the caller does not wait for the writing."""

import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.core.training import checkpoint as state
from crossflow.core.training.saving import Saver
from crossflow.core.training.shards import Stored


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this event."""
    event, write = threading.Event(), state.write_checkpoint

    def wait_and_write(*arguments: object) -> Path:
        assert event.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(state, "write_checkpoint", wait_and_write)
    return event


def test_the_state_at_the_call_is_saved_while_the_weights_change(
    tiny: ModuleType, held: threading.Event, tmp_path: Path
) -> None:
    learner = tiny.trainer(tmp_path).learner
    saver = Saver(learner, tmp_path, keep=2, background=True)
    for step in (3, 4):  # the second save takes the memory of the first
        before = {name: value.clone() for name, value in learner.model.state_dict().items()}
        held.clear()
        saver.start(step, {"step": step})  # it would never return if it waited
        with torch.no_grad():
            for parameter in learner.parameters:
                parameter.add_(1)
        assert not state.step_folder(tmp_path / "checkpoints", step).exists()
        held.set()
        path = saver.finish()
        assert path == state.step_folder(tmp_path / "checkpoints", step)
        state.verify(path)
        stored = Stored(path, "model").tensors({})
        assert all(stored[name].equal(value) for name, value in before.items())
        assert (tmp_path / "model.safetensors").samefile(path / "model.safetensors")
    assert saver.finish() is None


def test_a_run_that_saves_in_the_background_is_that_of_one_that_waits(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "waiting").run()
    saved: list[int] = []
    result = tiny.trainer(tmp_path / "background", background_saves=True, on_save=saved.append).run()
    assert saved == [4, 8, 12]
    assert result.checkpoint.name == "step_00000012"
    tiny.assert_same_run(tmp_path / "waiting", tmp_path / "background")


def test_a_failed_save_in_the_background_ends_the_run(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> Path:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(state, "write_checkpoint", full)
    with pytest.raises(UserError, match="cannot be written"):
        tiny.trainer(tmp_path, background_saves=True).run()
