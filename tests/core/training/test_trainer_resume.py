"""Resuming is exact, stopping is clean, and nothing that goes wrong costs the checkpoint before."""

import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crossflow.core.batch import Record
from crossflow.core.errors import UserError
from crossflow.core.training import checkpoint as state


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny: ModuleType, tmp_path: Path, stop_at: int) -> None:
    settings = {"validate": tiny.noisy_validation, "eval_every": 4, "schedule": "cosine", "log_every": 3}
    tiny.trainer(tmp_path / "through", **settings).run()

    class Stopping(tiny.Data):  # type: ignore[misc, name-defined]
        def collate(self, examples: list[Tensor]) -> Record:
            if len(self.seen) == 4 * stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collate(examples)

    first = tiny.trainer(tmp_path / "parts", data=Stopping(), **settings).run()
    assert (first.status, first.step, first.reason) == ("stopped", stop_at, "SIGTERM")
    torch.manual_seed(99)
    second = tiny.trainer(tmp_path / "parts", tiny.Objective(), **settings).run("auto")
    assert (second.status, second.step) == ("finished", 12)
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")
    for kind in ("train", "val"):
        assert tiny.lines(tmp_path / "through", kind) == tiny.lines(tmp_path / "parts", kind)


def test_resume_after_a_kill_takes_the_last_checkpoint_and_repeats_no_line(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "through", log_every=1).run()
    tiny.trainer(tmp_path / "killed", log_every=1, steps=8).run()
    # As if it had gone on to step 10, died while logging, while writing a checkpoint and while publishing.
    root = tmp_path / "killed"
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "loss": 1.0}\n{"kind": "train", "ste')
    half = root / "checkpoints" / ".tmp-step_00000010"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (root / ".tmp-model.safetensors").write_bytes(b"half")
    tiny.trainer(root, log_every=1).run("auto")
    tiny.assert_same_run(tmp_path / "through", root)
    assert tiny.lines(tmp_path / "through") == tiny.lines(root)
    assert [path.name for path in [*root.glob(".*"), *(root / "checkpoints").glob(".*")]] == []


def test_resume_auto_starts_in_an_empty_folder(tiny: ModuleType, tmp_path: Path) -> None:
    assert tiny.trainer(tmp_path).run("auto").status == "finished"


def test_resume_auto_does_not_continue_a_finished_run(tiny: ModuleType, tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path).run()
    before = (tmp_path / "metrics.jsonl").read_text()
    second = tiny.trainer(tmp_path).run("auto")
    assert (second.status, second.step, second.losses) == ("finished", 12, first.losses)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_more_steps_continue_a_finished_run(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "through", steps=15).run()
    tiny.trainer(tmp_path / "parts", steps=12).run()
    tiny.trainer(tmp_path / "parts", steps=15).run("auto")
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")


def test_resume_auto_falls_back_to_an_intact_checkpoint(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "through").run()
    tiny.trainer(tmp_path / "hurt").run()
    newest = tmp_path / "hurt" / "checkpoints" / "step_00000012" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    tiny.trainer(tmp_path / "hurt").run("auto")
    tiny.assert_same_run(tmp_path / "through", tmp_path / "hurt")
    assert tiny.lines(tmp_path / "through") == tiny.lines(tmp_path / "hurt")


def test_a_named_corrupt_checkpoint_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path).run()
    path = tmp_path / "checkpoints" / "step_00000012"
    (path / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_00000012.*ema\.safetensors is missing"):
        tiny.trainer(tmp_path).run(path)


def test_a_run_can_continue_a_checkpoint_of_another_run(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first").run()
    result = tiny.trainer(tmp_path / "second", steps=14).run(tmp_path / "first" / "checkpoints" / "step_00000008")
    assert result.step == 14
    assert [line["step"] for line in tiny.lines(tmp_path / "second")] == [9, 12, 14]
    assert state.checkpoints(tmp_path / "first" / "checkpoints")[0].name == "step_00000012"


@pytest.mark.parametrize("resume", ["first", None])
def test_a_run_without_steps_writes_checkpoint_and_weights(
    tiny: ModuleType, tmp_path: Path, resume: str | None
) -> None:
    tiny.trainer(tmp_path / "first").run()
    trainer = tiny.trainer(tmp_path / "second", steps=12 if resume else 0)
    result = trainer.run(tmp_path / resume if resume else None)
    assert (result.status, result.step) == ("finished", 12 if resume else 0)
    assert result.checkpoint.parent == tmp_path / "second" / "checkpoints"
    model = load_file(tmp_path / "second" / "model.safetensors")
    assert all(torch.equal(model[name], value) for name, value in trainer.learner.model.state_dict().items())


def test_a_run_is_not_overwritten(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path).run()
    with pytest.raises(UserError, match="--resume auto"):
        tiny.trainer(tmp_path).run()


def test_a_checkpoint_of_another_model_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path).run()
    other = tiny.Objective()
    other.model.source_encoder = nn.Linear(5, 3)
    with pytest.raises(UserError, match=r"another model.*source_encoder\.weight"):
        tiny.trainer(tmp_path, other).run("auto")


class Signalling:
    """Progress that sends signals to this process after certain steps."""

    def __init__(self, at: dict[int, list[signal.Signals]]) -> None:
        self.at = at
        self.notes: list[str] = []
        self.calls: list[str] = []

    def begin(self, step: int, total: int) -> None:
        self.calls.append(f"begin {step}/{total}")

    def advance(self, step: int) -> None:
        for number in self.at.get(step, []):
            os.kill(os.getpid(), number)

    def report(self, line: Mapping[str, object]) -> None:
        self.calls.append(f"{line['kind']} {line['step']}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_old_handlers_return(
    tiny: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    def handler(*args: object) -> None: ...

    before = signal.signal(number, handler)
    try:
        progress = Signalling({5: [number]})
        result = tiny.trainer(tmp_path, progress=progress).run()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert (result.status, result.step, result.reason) == ("stopped", 5, number.name)
    state.verify(tmp_path / "checkpoints" / "step_00000005")
    assert (tmp_path / "model.safetensors").exists()
    assert progress.notes[-1].startswith("Saved")
    assert progress.calls == ["begin 0/12", "train 3", "end"]


def test_a_second_ctrl_c_aborts_at_once(tiny: ModuleType, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    progress = Signalling({6: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, progress=progress).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert progress.calls[-1] == "end"
    assert [path.name for path in state.checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]


def test_a_launcher_that_repeats_sigterm_does_not_abort(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(tmp_path, progress=Signalling({6: [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]})).run()
    assert (result.status, result.step, result.reason) == ("stopped", 6, "SIGINT")


@pytest.mark.slow
def test_the_time_limit_ends_the_run_with_a_checkpoint(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(tmp_path, data=tiny.Data(seconds=0.01), steps=10**6, max_minutes=0.3 / 60).run()
    assert (result.status, result.reason) == ("stopped", "max_minutes")
    assert 0 < result.step < 100
    assert result.checkpoint.name == f"step_{result.step:08d}"


@pytest.mark.parametrize("bad", ["data", "part", "gradient"])
def test_non_finite_losses_stop_the_run_and_keep_the_last_checkpoint(
    tiny: ModuleType, tmp_path: Path, bad: str
) -> None:
    class Breaking(tiny.Objective):  # type: ignore[misc, name-defined]
        def forward(self, batch: object, noise: object) -> dict[str, Tensor]:
            losses = super().forward(batch, noise)
            if trainer.step == 9:
                if bad == "part":
                    losses["size"] = losses["size"] * float("inf")
                    losses["loss"] = losses["loss"] + losses["size"]
                if bad == "gradient":  # the square root has an infinite slope at 0
                    losses["loss"] = losses["loss"] + (self.head.weight * 0).abs().sum().sqrt()
            return losses

    data = tiny.Data(bad=3) if bad == "data" else tiny.Data()
    settings = {"log_every": 50, "save_every": 3 if bad != "data" else 1}
    trainer = tiny.trainer(tmp_path, Breaking(), data, **settings)
    with pytest.raises(UserError, match="not finite") as caught:
        trainer.run()
    text = str(caught.value)
    good = state.checkpoints(tmp_path / "checkpoints")
    if bad == "data":
        first = next(step for step in range(12) if any(trainer.data.example_at(4 * step + k)[1] == 3 for k in range(4)))
        assert f"at step {first + 1}:" in text
        assert len(good) == min(first, 2)
    else:
        assert "at step 10:" in text
        assert ("size" in text.split(".")[0]) == (bad == "part")
        assert ("gradient norm" in text) == (bad == "gradient")
        assert good[0].name == "step_00000009"
    assert (str(good[0]) if good else "No checkpoint") in text
    assert "train.lr" in text
    for path in good:
        state.verify(path)
        assert all(value.isfinite().all() for value in load_file(path / "model.safetensors").values())


def test_a_full_disk_stops_the_run_with_one_message(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = state.write_tensors

    def write_tensors(path: Path, values: dict[str, Tensor]) -> None:
        if "00000008" in str(path) and path.name == "ema.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, values)

    monkeypatch.setattr(state, "write_tensors", write_tensors)
    with pytest.raises(UserError, match="too full for the checkpoint of step 8"):
        tiny.trainer(tmp_path).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    monkeypatch.undo()
    tiny.trainer(tmp_path).run("auto")
    tiny.trainer(tmp_path / "through").run()
    tiny.assert_same_run(tmp_path / "through", tmp_path)
