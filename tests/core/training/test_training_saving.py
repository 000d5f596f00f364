"""Saving in the background: what is written is the state at the call, and the caller does not wait for the writing."""

import copy
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.checkpoint.staging import DefaultStager

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


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ends of copies, each of which is delayed."""
    ends: list[str] = []
    stage = DefaultStager.stage

    def late(stager: DefaultStager, tensors: dict) -> object:
        time.sleep(0.1)
        copies = stage(stager, tensors)
        ends.append("copied")
        return copies

    monkeypatch.setattr(DefaultStager, "stage", late)
    return ends


def test_the_state_at_the_call_is_saved_while_training_continues(
    tiny: ModuleType, held: threading.Event, delayed: list[str], tmp_path: Path
) -> None:
    trainer = tiny.trainer(tmp_path)
    learner = trainer.learner
    steps = trainer.trial(4)
    next(steps)  # makes the state of the optimizer
    saver = Saver(learner, tmp_path, keep=2, background=True)
    for step in (3, 4):  # the second save takes the memory of the first
        before = copy.deepcopy(learner.tensors())
        held.clear()
        saver.start(step, {"step": step})  # it would never return if it waited
        if step == 3:
            next(steps)
        else:
            with learner.averaged():
                assert len(delayed) == 2, "the weights were changed while they were copied"
            next(steps)
        assert len(delayed) == step - 2, "the weights were changed while they were copied"
        assert not state.step_folder(tmp_path / "checkpoints", step).exists()
        held.set()
        path = saver.finish()
        assert path == state.step_folder(tmp_path / "checkpoints", step)
        state.verify(path)
        for part, tensors in before.items():
            stored = Stored(path, part).tensors({})
            assert all(stored[name].equal(value) for name, value in tensors.items()), part
        assert any(not value.equal(before["model"][name]) for name, value in learner.model.state_dict().items())
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
