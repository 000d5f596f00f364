"""What ends a training from outside ends it with a message that says what to do, and costs no checkpoint."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.training import checkpoint as state


class Hungry:
    """Makes an objective run out of memory for more than `limit` samples at a time, from step `start` (from 0) on."""

    def __init__(self, tiny: ModuleType, limit: int, start: int, error: Exception) -> None:
        class Objective(tiny.Objective):  # type: ignore[misc, name-defined]
            def forward(objective, batch: object, noise: object) -> dict[str, Tensor]:
                losses = super().forward(batch, noise)
                if self.trainer.step >= start and len(batch) > limit:
                    raise error
                return losses

        torch.manual_seed(0)
        self.objective, self.trainer = Objective(dropout=False), None

    def train(self, tiny: ModuleType, folder: Path, **settings: object) -> object:
        self.trainer = tiny.trainer(folder, self.objective, **settings)
        return self.trainer


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_out_of_memory_is_explained_with_the_plan(tiny: ModuleType, tmp_path: Path, error: Exception) -> None:
    hungry = Hungry(tiny, 1, 5, error)
    with pytest.raises(UserError) as caught:
        hungry.train(tiny, tmp_path, accumulate=2).run()
    text = str(caught.value)
    for words in ("weights ", "gradients ", "optimizer ", "ema ", "activations of 2 samples", "train.accumulate=4"):
        assert words in text
    assert "train.checkpointing=true" in text
    assert "step_00000004; --resume auto" in text


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_halved_parts_make_the_same_steps(tiny: ModuleType, tmp_path: Path, error: Exception) -> None:
    hungry = Hungry(tiny, 1, 6, error)
    trainer = hungry.train(tiny, tmp_path / "hungry", auto_micro_batch=True, log_every=1)
    assert trainer.run().status == "finished"
    assert trainer._halvings == 2
    Hungry(tiny, 4, 0, error).train(tiny, tmp_path / "fed", log_every=1).run()
    for few, many in zip(tiny.lines(tmp_path / "hungry"), tiny.lines(tmp_path / "fed"), strict=True):
        assert {**few, "kind": 0} == pytest.approx({**many, "kind": 0}, rel=1e-4)
    assert tiny.lines(tmp_path / "hungry")[:6] == tiny.lines(tmp_path / "fed")[:6]


def test_a_run_with_halved_parts_resumes_to_the_same_bits(tiny: ModuleType, tmp_path: Path) -> None:
    for name, stops in (("through", [12]), ("parts", [8, 12])):
        for stop in stops:
            hungry = Hungry(tiny, 2, 6, MemoryError())
            hungry.train(tiny, tmp_path / name, auto_micro_batch=True, steps=stop).run("auto")
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")


def test_a_single_sample_that_does_not_fit_ends_the_run(tiny: ModuleType, tmp_path: Path) -> None:
    hungry = Hungry(tiny, 0, 0, MemoryError())
    with pytest.raises(UserError, match="activations of 1 samples"):
        hungry.train(tiny, tmp_path, auto_micro_batch=True).run()


class Dying:
    """Data whose loader worker does something to itself at the item `index`."""

    def __init__(self, tiny: ModuleType, act: object, index: int = 3) -> None:
        self.data, self.act, self.index, self.parent = tiny.Data(), act, index, os.getpid()
        self.ahead = self.in_workers = True
        self.collate, self.batch = self.data.collate, self.data.batch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        if key[1] == self.index and os.getpid() != self.parent:
            self.act()
        return self.data[key]


def refuse() -> None:
    raise UserError("Shard 7 is damaged. Download it again.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by SIGKILL.*lower train\.num_workers"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"was killed by SIGSEGV.*num_workers=0 shows where"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"was killed by SIGBUS.*--shm-size"),
        (lambda: os._exit(7), r"ended with status 7\."),
        (refuse, r"^Shard 7 is damaged\. Download it again\.$"),
    ],
    ids=["SIGKILL", "SIGSEGV", "SIGBUS", "exit", "refusal"],
)
def test_a_dead_loader_worker_is_explained(tiny: ModuleType, tmp_path: Path, act: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny.trainer(tmp_path, data=Dying(tiny, act), num_workers=1, save_every=1).run()
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == [], "a process that fails would wait for its workers"
    for path in state.checkpoints(tmp_path / "checkpoints"):
        state.verify(path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_a_checkpoint_costs_no_earlier_one(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(path: Path, content: str) -> Path:
        if "00000008" in str(path):
            raise OSError(number, os.strerror(number))
        return write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_atomically", refused)
        with pytest.raises(
            UserError, match=rf"step 8 cannot be written.*{os.strerror(number)}.*step_00000004; --resume"
        ):
            tiny.trainer(tmp_path / "run").run()
    tiny.trainer(tmp_path / "run").run("auto")
    tiny.trainer(tmp_path / "through").run()
    tiny.assert_same_run(tmp_path / "through", tmp_path / "run")


def test_a_clock_set_back_changes_nothing(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.trainer(tmp_path / "steady", max_minutes=5).run()
    ticks = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    result = tiny.trainer(tmp_path / "turned", max_minutes=5).run()
    assert (result.status, result.seconds >= 0) == ("finished", True)
    tiny.assert_same_run(tmp_path / "steady", tmp_path / "turned")
    lines = [json.loads(line) for line in (tmp_path / "turned" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds_per_step"] >= 0 for line in lines)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), state.NoSpace(Path("there"), 2, 10, 5)])
def test_a_checkpoint_beside_a_long_step_that_cannot_be_written_is_reported(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is a thread that writes it, whose errors nobody would see."""
    trainer, notes = tiny.trainer(tmp_path), []
    monkeypatch.setattr(trainer.progress, "note", notes.append)
    monkeypatch.setattr(trainer.learner, "tensors", lambda: (_ for _ in ()).throw(error))
    trainer._rescue()
    assert notes == [f"The checkpoint of step 0 cannot be written: {error}"]
