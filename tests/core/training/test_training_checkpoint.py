"""Checkpoints are atomic, checked, bounded in number and free of pickles."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors, remove_temporaries
from crossflow.core.training import checkpoint as state
from crossflow.core.training.checkpoint import CorruptCheckpoint, NoSpace
from crossflow.core.training.shards import Stored


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((3, 2), value)},
        "ema": {"weight": torch.full((3, 2), value / 2)},
        "objective": {},
    }


def write(root: Path, step: int, keep: int = 9) -> Path:
    return state.write_checkpoint(root, step, tensors(float(step)), {"step": step}, keep)


def test_checkpoints_are_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    state.verify(path)
    assert path.name == "step_00000007"
    assert state.read_state(path) == {"step": 7}
    assert torch.equal(Stored(path, "model").tensors({})["weight"], torch.full((3, 2), 7.0))
    assert Stored(path, "objective").tensors({}) == {}


def test_files_are_json_and_safetensors_only(tmp_path: Path) -> None:
    names = {path.name for path in write(tmp_path, 1).iterdir()}
    assert names == {"model.safetensors", "ema.safetensors", "state.json", "checkpoint.json"}


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    path = state.write_checkpoint(tmp_path, 1, {"model": {"a": weight, "b": weight}}, {}, 1)
    read = Stored(path, "model").tensors({})
    assert torch.equal(read["a"], weight)
    assert torch.equal(read["b"], weight)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2)
    assert [path.name for path in state.checkpoints(tmp_path)] == ["step_00000020", "step_00000015"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000015", "step_00000020"]


def test_writing_an_earlier_step_discards_later_checkpoints(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    write(tmp_path, 10)
    assert [path.name for path in state.checkpoints(tmp_path)] == ["step_00000010", "step_00000005"]


def damage(path: Path, how: str) -> str:
    """Damages a checkpoint; returns what its error must name."""
    file = path / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "altered":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "no manifest":
        (path / "checkpoint.json").unlink()
        return "checkpoint.json"
    elif how == "half a manifest":
        (path / "checkpoint.json").write_text((path / "checkpoint.json").read_text()[:40])
        return "checkpoint.json"
    return "model.safetensors"


DAMAGES = ["truncated", "altered", "missing", "empty", "no manifest", "half a manifest"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_detected_and_described(tmp_path: Path, how: str) -> None:
    path = write(tmp_path, 3)
    name = damage(path, how)
    with pytest.raises(CorruptCheckpoint) as caught:
        state.verify(path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_auto_takes_the_newest_intact_checkpoint_and_logs_the_damaged(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 3), write(tmp_path, 6)
    name = damage(bad, how)
    with caplog.at_level(logging.WARNING):
        assert state.find_checkpoint(tmp_path, "auto") == good
    assert bad.name in caplog.text
    assert name in caplog.text


def test_a_requested_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    write(root, 3)
    damage(write(root, 6), "altered")
    for asked in (root / "step_00000006", tmp_path / "run", root):
        with pytest.raises(CorruptCheckpoint, match="step_00000006"):
            state.find_checkpoint(root, asked)
    assert state.find_checkpoint(root, root / "step_00000003") == root / "step_00000003"


def test_auto_does_not_restart_when_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    damage(write(tmp_path, 3), "truncated")
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        state.find_checkpoint(tmp_path, "auto")


def test_a_checkpoint_is_resumed_only_on_request(tmp_path: Path) -> None:
    assert state.find_checkpoint(tmp_path, "auto") is None
    assert state.find_checkpoint(tmp_path, None) is None
    write(tmp_path, 3)
    with pytest.raises(UserError, match="--resume auto"):
        state.find_checkpoint(tmp_path, None)
    with pytest.raises(UserError, match="does not exist"):
        state.find_checkpoint(tmp_path, tmp_path / "nowhere")


def exit_at(instant: int) -> None:
    """Makes this process exit silently at its `instant`-th system call that changes a folder or a file."""
    count = 0

    def counted(original: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == instant:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "scandir"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for instant in range(1, 200):
        root = tmp_path / str(instant)
        write(root, 1, keep=1)
        child = os.fork()
        if child == 0:
            exit_at(instant)
            write(root, 2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        remove_temporaries(root)
        newest = state.find_checkpoint(root, "auto")
        assert newest is not None
        step = state.read_state(newest)["step"]
        assert torch.equal(Stored(newest, "model").tensors({})["weight"], torch.full((3, 2), float(step)))
        assert list(root.glob("[.]*")) == []
        outcomes.append(step)
        if status == 0:
            break
    assert len(outcomes) > 15, "the child was not interrupted often enough to mean anything"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
     SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["full", "quota", "full in safetensors"],
)  # fmt: skip
def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int, error: Exception
) -> None:
    good = write(tmp_path, 1, keep=1)
    written = []
    original = safetensors.torch.save_file

    def save_file(values: dict, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) == which:
            path.write_bytes(b"half")
            raise error
        original(values, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(NoSpace, match="--resume auto") as caught:
        write(tmp_path, 2, keep=1)
    assert caught.value.needed > 0
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    state.verify(good)


def test_a_full_disk_while_writing_json_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1, keep=1)

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write_atomically", full)
    with pytest.raises(NoSpace):
        write(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_insufficient_space_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(state, "write_tensors", lambda *args: pytest.fail("something was written"))
    with pytest.raises(NoSpace, match=r"it needs 1\.0 MB, 1\.0 kB are free"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, values: dict) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(state, "write_tensors", broken)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_published_weights_follow_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2):
        path = write(tmp_path / "checkpoints", step, keep=1)
        state.publish(path, ("model", "ema", "objective"), tmp_path)
        state.publish(path, ("model", "ema", "objective"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema.safetensors", "model.safetensors"]
    assert read_tensors(tmp_path / "model.safetensors")["weight"][0, 0] == 2


def test_optimizer_state_survives_the_round_trip(tmp_path: Path) -> None:
    def training() -> tuple[nn.Module, torch.optim.AdamW, dict[Tensor, str]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(
            [{"params": [model.bias], "weight_decay": 0.0}, {"params": [model.weight]}], lr=0.1
        )
        return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer, names = training()
    for _ in range(3):
        step(first, optimizer)
    saved = {"optimizer": state.optimizer_tensors(optimizer, names), "model": first.state_dict()}
    path = state.write_checkpoint(tmp_path, 3, saved, {}, 1)
    second, other, other_names = training()
    second.load_state_dict(Stored(path, "model").tensors({}))
    state.load_optimizer(other, other_names, Stored(path, "optimizer").tensors({}))
    step(first, optimizer)
    step(second, other)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_optimizer_state_of_another_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match="stranger"):
        state.load_optimizer(optimizer, names, {"exp_avg/stranger": torch.zeros(2)})


def test_manifest_lists_every_other_file(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    manifest = json.loads((path / "checkpoint.json").read_text())
    assert manifest["step"] == 4
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"checkpoint.json"}
