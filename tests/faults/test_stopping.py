"""SIGTERM leaves a checkpoint within the grace period, whatever is going on."""

import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from crossflow.core.distributed import Abandoned
from crossflow.core.training.signals import StopRequest


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["validate", "sample"])
@pytest.mark.parametrize("step", [4, 6])
def test_a_validation_is_given_up_at_once_and_repeated(tiny: ModuleType, tmp_path: Path, kind: str, step: int) -> None:
    """At step 4 a checkpoint has just been written, at step 6 it has not."""
    evaluated: list[int] = []

    def callback(interrupted: bool) -> object:
        def run(at: int) -> dict[str, float]:
            if interrupted and at == step:
                terminate()
                time.sleep(60)
            evaluated.append(at)
            return {"score": torch.rand(()).item()}

        return run

    every = {"validate": "eval_every", "sample": "sample_every"}[kind]
    tiny.trainer(tmp_path / "through", **{kind: callback(False), every: 2}).run()
    evaluated.clear()
    start = time.monotonic()
    first = tiny.trainer(tmp_path / "parts", **{kind: callback(True), every: 2}).run()
    assert time.monotonic() - start < 20
    assert (first.status, first.step, first.reason) == ("stopped", step, "SIGTERM")
    assert first.checkpoint.name == f"step_{step:08d}"
    tiny.trainer(tmp_path / "parts", **{kind: callback(False), every: 2}).run("auto")
    assert evaluated == [2, 4, 6, 8, 10, 12]
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")
    assert tiny.lines(tmp_path / "through", "val") == tiny.lines(tmp_path / "parts", "val")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["data", "forward"])
def test_a_step_that_takes_too_long_is_given_up_and_repeated(tiny: ModuleType, tmp_path: Path, where: str) -> None:
    class Stuck(tiny.Objective):  # type: ignore[misc, name-defined]
        def forward(self, batch: object, noise: object) -> dict[str, Tensor]:
            if where == "forward" and trainer.step == 6:
                terminate()
                time.sleep(60)
            return super().forward(batch, noise)

    class Slow(tiny.Data):  # type: ignore[misc, name-defined]
        def __getitem__(self, key: tuple[int, int]) -> Tensor:
            if where == "data" and trainer.step == 6:
                terminate()
                time.sleep(60)
            return super().__getitem__(key)

    settings = {"grace_seconds": 0.2, "accumulate": 2, "log_every": 5}
    torch.manual_seed(0)
    trainer = tiny.trainer(tmp_path / "parts", Stuck(), Slow(), **settings)
    result = trainer.run()
    assert (result.status, result.step) == ("stopped", 6)
    assert result.seconds < 20
    tiny.trainer(tmp_path / "parts", **settings).run("auto")
    tiny.trainer(tmp_path / "through", **settings).run()
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")
    assert tiny.lines(tmp_path / "through") == tiny.lines(tmp_path / "parts")


def test_a_step_within_half_of_the_grace_period_is_completed(tiny: ModuleType, tmp_path: Path) -> None:
    class Slow(tiny.Objective):  # type: ignore[misc, name-defined]
        def forward(self, batch: object, noise: object) -> dict[str, Tensor]:
            if trainer.step == 6:
                terminate()
                time.sleep(0.1)
            return super().forward(batch, noise)

    trainer = tiny.trainer(tmp_path, Slow(), grace_seconds=60)
    assert trainer.run().step == 7


def test_no_alarm_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with StopRequest() as stop:
        terminate()
        with stop.abandoning(100):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        with pytest.raises(Abandoned), stop.abandoning(0):
            pytest.fail("work begun after its time")
    assert signal.getsignal(signal.SIGALRM) is before
